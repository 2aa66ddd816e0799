"""Chooses the names that the routes look up in a table. The table is bounded, because Envoy builds its routes again at each change."""

from collections.abc import Iterable, Mapping

from mesh.envoy.plan import Carrier, name_prefix

MOST_NAMES = 200
"""The names of a carrier's table. Envoy takes about 20 ms to read a table of so many, and no change of clusters meanwhile."""

_PREFIXES = {name_prefix(carrier, from_peers=False): carrier for carrier in Carrier}

Names = Mapping[Carrier, tuple[str, ...]]


def listed_names(before: Names, clusters: Iterable[str], most: int = MOST_NAMES) -> Names:
    """Return the names to list by carrier, in order. `clusters`: the names of clusters that Envoy has.

    A name that is listed stays until its cluster goes. Others take the free places.
    """
    found: dict[Carrier, set[str]] = {carrier: set() for carrier in Carrier}
    for cluster in clusters:
        prefix, _, name = cluster.partition("/")
        if prefix in _PREFIXES:
            found[_PREFIXES[prefix]].add(name)
    listed = {}
    for carrier, names in found.items():
        kept = names.intersection(before.get(carrier, ()))
        free = max(0, most - len(kept))
        listed[carrier] = tuple(sorted(kept | set(sorted(names - kept)[:free])))
    return listed


def listed_clusters(names: Names) -> frozenset[str]:
    """Return the names of the clusters that a table leads to."""
    return frozenset(
        f"{name_prefix(carrier, from_peers=False)}/{name}" for carrier, each in names.items() for name in each
    )
