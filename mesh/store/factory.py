"""From a location to a store: the one place that knows both implementations."""

from mesh.store.embedded import EmbeddedStore
from mesh.store.etcd import EtcdStore
from mesh.store.location import EmbeddedLocation, StoreLocation
from mesh.store.protocol import Store


def store_at(location: StoreLocation) -> Store:
    """Not yet opened."""
    if isinstance(location, EmbeddedLocation):
        return EmbeddedStore(location.directory)
    return EtcdStore(location)
