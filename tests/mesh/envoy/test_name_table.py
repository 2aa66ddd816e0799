"""The table of names that Envoy's routes look up."""

from hypothesis import given
from hypothesis import strategies as st

from mesh.envoy.name_table import listed_clusters, listed_names
from mesh.envoy.plan import Carrier

NAMES = st.sets(st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=3), max_size=12)


@given(NAMES, NAMES, st.integers(1, 8))
def test_listed_names_are_those_of_clusters_and_keep_their_places(first: set[str], second: set[str], most: int) -> None:
    before = listed_names({}, [f"grpc/{name}" for name in first], most)
    after = listed_names(before, [f"grpc/{name}" for name in second], most)
    listed = set(after[Carrier.GRPC])
    assert listed <= second
    assert len(listed) == min(most, len(second))
    assert set(before[Carrier.GRPC]) & second <= listed
    assert after[Carrier.HTTP] == ()


@given(NAMES, NAMES)
def test_listed_clusters_leave_peers_clusters_out(grpc: set[str], http: set[str]) -> None:
    clusters = {f"grpc/{name}" for name in grpc} | {f"http/{name}" for name in http}
    names = listed_names({}, clusters | {f"grpc-peers/{name}" for name in grpc} | {"mesh-grpc"})
    assert listed_clusters(names) == clusters
