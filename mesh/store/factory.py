"""Creates the store for a location."""

from mesh.store.embedded import EmbeddedStore
from mesh.store.etcd import EtcdStore
from mesh.store.location import EmbeddedLocation, StoreLocation
from mesh.store.protocol import Store


def store_at(location: StoreLocation) -> Store:
    """Return the store, which is not open yet."""
    if isinstance(location, EmbeddedLocation):
        return EmbeddedStore(location.directory)
    return EtcdStore(location)
