"""Creates the store for a location."""

from collections.abc import Callable

from mesh.store.embedded import EmbeddedStore
from mesh.store.etcd import EtcdStore
from mesh.store.location import EmbeddedLocation, EtcdLocation, StoreLocation
from mesh.store.protocol import Store


def store_at(location: StoreLocation, reread: Callable[[], StoreLocation] | None = None) -> Store:
    """Return the store, which is not open yet. `reread` parses the location again after its files have changed."""
    if isinstance(location, EmbeddedLocation):
        return EmbeddedStore(location.directory)

    def reread_etcd() -> EtcdLocation:
        found = reread() if reread is not None else location
        return found if isinstance(found, EtcdLocation) else location

    return EtcdStore(location, reread=reread_etcd)
