"""The headers that Envoy writes for the endpoints of a cluster."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from mesh.access.peer_keys import HOP_HEADER, PEER_KEY_HEADER
from mesh.api.envoy_clusters import encoded
from mesh.api.envoy_control import EnvoyControl
from mesh.envoy.plan import CarriedName, Carrier, Here, PeerCopy, plan_clusters, withdrawn
from mesh.envoy.routes import PEER_HEADER
from wire import envoy_pb2 as pb

HERE = Here(
    runtime=dict.fromkeys(Carrier, "unix:/runtime"),
    mesh=dict.fromkeys(Carrier, "unix:/mesh"),
    hop="pod-a",
    peer_key="secret",
)


def changed_headers(content: bytes) -> tuple[set[str], set[str]]:
    """Return the headers that a serialised cluster removes, and those that it writes, at each attempt."""
    [options] = pb.Cluster.FromString(content).typed_extension_protocol_options.values()
    filters = pb.HttpProtocolOptions.FromString(options.value).http_filters
    if not filters:
        return set(), set()
    mutations = pb.HeaderMutationFilter.FromString(filters[0].typed_config.value).mutations.request_mutations
    removed = {mutation.remove for mutation in mutations if mutation.remove}
    return removed, {mutation.append.header.key for mutation in mutations if mutation.HasField("append")}


@given(st.sampled_from(Carrier), st.booleans(), st.booleans(), st.booleans())
def test_encoded_clusters_remove_the_headers_of_peers_that_they_have_met(
    carrier: Carrier, is_local: bool, has_peer: bool, has_met: bool
) -> None:
    """A retried call may come from a version of the cluster that led to a peer, and must not reach the mesh as a peer's call."""
    peers = (PeerCopy("pod-b", "10.0.0.2:8033"),) if has_peer else ()
    carried = CarriedName("m", "m__1", carrier, 0.0 if is_local else None, peers)
    for cluster in (*plan_clusters([carried], HERE).values(), withdrawn(carried, HERE)):
        removed, written = changed_headers(encoded(cluster, None, met_peers=has_met))
        if has_met or cluster.meets_peers:
            assert removed == {HOP_HEADER, PEER_KEY_HEADER, PEER_HEADER}
            assert written == {HOP_HEADER, PEER_KEY_HEADER}
        else:
            assert not removed | written, "calls without peers go through no filter"


@given(st.sampled_from(Carrier), st.booleans())
def test_encoded_clusters_of_peers_calls_write_their_headers(carrier: Carrier, is_withdrawn: bool) -> None:
    carried = CarriedName("m", "m", carrier, 0.0, from_peers=True)
    [cluster] = plan_clusters([carried], HERE).values()
    _, written = changed_headers(encoded(withdrawn(carried, HERE) if is_withdrawn else cluster, None))
    assert written == {HOP_HEADER, PEER_KEY_HEADER}


def test_published_cluster_remembers_that_it_has_met_peers() -> None:
    control = EnvoyControl("unix:/nowhere", lambda: None, lambda _: None)
    alone = CarriedName("m", "m__1", Carrier.GRPC, 0.0)
    together = replace(alone, peers=(PeerCopy("pod-b", "10.0.0.2:8033"),))
    [with_peers], [without] = (plan_clusters([each], HERE).values() for each in (together, alone))
    generations = [control.publish({each.name: each}, ()) for each in (without, with_peers, without)]
    assert generations == [1, 2, 3]
    assert control.publish({without.name: without}, ()) == 3
    assert control.publish({without.name: without}, [without.name]) == 4, "after its removal it is another cluster"
    assert control.publish({without.name: without}, ()) == 4
