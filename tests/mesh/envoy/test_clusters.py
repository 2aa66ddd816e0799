"""The headers that Envoy writes for the endpoints of a cluster."""

from hypothesis import given
from hypothesis import strategies as st

from mesh.access.peer_keys import HOP_HEADER, PEER_KEY_HEADER
from mesh.api.envoy_clusters import encoded
from mesh.envoy.plan import CarriedName, Carrier, Here, PeerCopy, plan_clusters, withdrawn
from mesh.envoy.routes import PEER_HEADER
from wire import envoy_pb2 as pb

HERE = Here(
    runtime=dict.fromkeys(Carrier, "unix:/runtime"),
    mesh=dict.fromkeys(Carrier, "unix:/mesh"),
    hop="pod-a",
    peer_key="secret",
)


@given(st.sampled_from(Carrier), st.booleans(), st.booleans())
def test_encoded_clusters_remove_the_headers_of_an_earlier_version(
    carrier: Carrier, is_local: bool, has_peer: bool
) -> None:
    """A retried call may come from a version of the cluster that led to a peer, and must not reach the mesh as a peer's call."""
    peers = (PeerCopy("pod-b", "10.0.0.2:8033"),) if has_peer else ()
    carried = CarriedName("m", "m__1", carrier, 0.0 if is_local else None, peers)
    for cluster in (*plan_clusters([carried], HERE).values(), withdrawn(carried, HERE)):
        [options] = pb.Cluster.FromString(encoded(cluster, None)).typed_extension_protocol_options.values()
        writer = pb.HttpProtocolOptions.FromString(options.value).http_filters[0]
        mutations = pb.HeaderMutationFilter.FromString(writer.typed_config.value).mutations.request_mutations
        assert {HOP_HEADER, PEER_KEY_HEADER, PEER_HEADER} <= {mutation.remove for mutation in mutations}
        written = {mutation.append.header.key for mutation in mutations if mutation.HasField("append")}
        assert "mm-model-id" in written
