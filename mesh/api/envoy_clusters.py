"""Encodes planned clusters as Envoy's protobuf messages."""

import base64
from dataclasses import dataclass
from functools import cache

from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from google.protobuf.wrappers_pb2 import UInt32Value

from common.addresses import parse_address
from mesh.access.tls import TlsMaterial
from mesh.envoy.plan import Carrier, Cluster, Endpoint
from mesh.envoy.routes import NAMESPACE, PEER_HEADER
from wire import envoy_pb2 as pb

CLUSTER_TYPE = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
_TYPE = "type.googleapis.com/envoy.extensions."
_UNLIMITED = UInt32Value(value=1_000_000_000)
_CONNECT_S = 2
_PING_S = 2
_PONG_S = 4
_SOCKET_MATCH = "envoy.transport_socket_match"
# The headers that an endpoint gets, by the keys of its values.
_PEER_HEADERS = {"repertory-hop": "hop", "repertory-peer-key": "peer_key"}


@dataclass(frozen=True, slots=True)
class PeerTls:
    """This pod's certificate towards other pods, and the name that theirs must carry."""

    material: TlsMaterial
    peer_name: str


def encoded(cluster: Cluster, peer_tls: PeerTls | None, *, met_peers: bool = False) -> bytes:
    """Return the serialised cluster. `peer_tls` is for endpoints that expect a certificate. `met_peers`: Envoy has had a version that met peers."""
    message = pb.Cluster(
        name=cluster.name,
        metadata=_metadata(cluster),
        alt_stat_name=cluster.stat_name,
        connect_timeout=Duration(seconds=_CONNECT_S),
        lb_policy=pb.Cluster.LEAST_REQUEST,
        circuit_breakers=pb.CircuitBreakers(
            thresholds=[
                pb.Thresholds(
                    max_connections=_UNLIMITED,
                    max_pending_requests=_UNLIMITED,
                    max_requests=_UNLIMITED,
                    max_retries=_UNLIMITED,
                )
            ]
        ),
        # A tier whose endpoints all fail hands its calls to the next one instead of trying them all the same.
        common_lb_config=pb.CommonLbConfig(healthy_panic_threshold=pb.Percent(value=0)),
        outlier_detection=pb.OutlierDetection(
            consecutive_5xx=UInt32Value(value=5),
            interval=Duration(seconds=1),
            base_ejection_time=Duration(seconds=5),
            max_ejection_percent=UInt32Value(value=100),
        ),
        load_assignment=pb.ClusterLoadAssignment(
            cluster_name=cluster.name,
            endpoints=[
                pb.LocalityLbEndpoints(
                    priority=number,
                    lb_endpoints=[_endpoint(endpoint, by) for endpoint in tier],
                )
                for number, (tier, by) in enumerate(zip(cluster.tiers, _answering(cluster), strict=True))
            ],
        ),
    )
    message.typed_extension_protocol_options["envoy.extensions.upstreams.http.v3.HttpProtocolOptions"].CopyFrom(
        _protocol_options(cluster.carrier, meets_peers=met_peers or cluster.meets_peers, pings=cluster.pings)
    )
    if peer_tls is not None and any(endpoint.secure for tier in cluster.tiers for endpoint in tier):
        message.transport_socket_matches.append(_secure_socket(peer_tls, cluster.carrier))
    return message.SerializeToString(deterministic=True)


def _answering(cluster: Cluster) -> list[str]:
    """Return what answers a call in each tier, as the statistics of keys name it. The last tier is the mesh."""
    return [*["copy"] * (len(cluster.tiers) - 1), "mesh"]


def _metadata(cluster: Cluster) -> pb.Metadata:
    """Return what the routes write into the headers of each call of the cluster."""
    values = Struct()
    model = cluster.model_id
    values.update({"name": cluster.called_name, "model": model, "model_bin": base64.b64encode(model.encode()).decode()})
    return pb.Metadata(filter_metadata={NAMESPACE: values})


def _endpoint(endpoint: Endpoint, by: str) -> pb.LbEndpoint:
    address = parse_address(endpoint.address)
    found = (
        pb.Address(pipe=pb.Pipe(path=address.path))
        if address.path
        else pb.Address(socket_address=pb.SocketAddress(address=address.host, port_value=address.port))
    )
    values = Struct()
    values.update({"hop": endpoint.hop, "peer_key": endpoint.peer_key, "by": by})
    metadata = pb.Metadata(filter_metadata={NAMESPACE: values})
    if endpoint.secure:
        match = Struct()
        match.update({"secure": True})
        metadata.filter_metadata[_SOCKET_MATCH].CopyFrom(match)
    return pb.LbEndpoint(
        endpoint=pb.Endpoint(address=found),
        metadata=metadata,
        load_balancing_weight=UInt32Value(value=endpoint.weight),
    )


@cache
def _protocol_options(carrier: Carrier, *, meets_peers: bool, pings: bool) -> Any:
    """Return the protocol of the endpoints, and the filter that writes peers' headers once an endpoint is chosen.

    The filter costs each call a tenth of what a bare Envoy takes for it, so clusters that have never met peers have none.
    """
    is_grpc = carrier is Carrier.GRPC
    config = (
        pb.ExplicitHttpConfig(
            http2_protocol_options=pb.Http2ProtocolOptions(connection_keepalive=_keep_alive() if pings else None)
        )
        if is_grpc
        else pb.ExplicitHttpConfig(http_protocol_options=pb.Http1ProtocolOptions())
    )
    return _any(
        "upstreams.http.v3.HttpProtocolOptions",
        pb.HttpProtocolOptions(explicit_http_config=config, http_filters=_peer_filters() if meets_peers else ()),
    )


def _peer_filters() -> list[pb.HttpFilter]:
    # A call may have been tried at an endpoint that got peers' headers, of this version of the cluster or of an earlier one.
    mutations = [
        *(pb.HeaderMutation(remove=header) for header in (PEER_HEADER, *_PEER_HEADERS)),
        *(pb.HeaderMutation(append=_overwriting(header, key)) for header, key in _PEER_HEADERS.items()),
    ]
    writer = pb.HeaderMutationFilter(mutations=pb.Mutations(request_mutations=mutations))
    return [
        pb.HttpFilter(
            name="endpoint_headers",  # another name than the listeners' filter, which routes switch off by its name
            typed_config=_any("filters.http.header_mutation.v3.HeaderMutation", writer),
        ),
        pb.HttpFilter(
            name="envoy.filters.http.upstream_codec",
            typed_config=_any("filters.http.upstream_codec.v3.UpstreamCodec", pb.UpstreamCodec()),
        ),
    ]


def _overwriting(header: str, key: str) -> pb.HeaderValueOption:
    value = pb.HeaderValue(key=header, value=f"%UPSTREAM_METADATA({NAMESPACE}:{key})%")
    return pb.HeaderValueOption(header=value, append_action=pb.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD)


def _keep_alive() -> pb.KeepaliveSettings:
    """Return the settings of the pings by which frozen processes are found: a stopped process keeps its connections open."""
    return pb.KeepaliveSettings(interval=Duration(seconds=_PING_S), timeout=Duration(seconds=_PONG_S))


def _secure_socket(tls: PeerTls, carrier: Carrier) -> pb.TransportSocketMatch:
    context = pb.UpstreamTlsContext(
        sni=tls.peer_name,
        common_tls_context=pb.CommonTlsContext(
            alpn_protocols=["h2"] if carrier is Carrier.GRPC else ["http/1.1"],
            tls_certificates=[
                pb.TlsCertificate(
                    certificate_chain=pb.DataSource(inline_bytes=tls.material.certificate),
                    private_key=pb.DataSource(inline_bytes=tls.material.key),
                )
            ],
            validation_context=pb.CertificateValidationContext(
                trusted_ca=pb.DataSource(inline_bytes=tls.material.authority),
                match_typed_subject_alt_names=[
                    pb.SubjectAltNameMatcher(
                        san_type=pb.SubjectAltNameMatcher.DNS, matcher=pb.StringMatcher(exact=tls.peer_name)
                    )
                ],
            ),
        ),
    )
    match = Struct()
    match.update({"secure": True})
    return pb.TransportSocketMatch(
        name="peers",
        match=match,
        transport_socket=pb.TransportSocket(
            name="envoy.transport_sockets.tls",
            typed_config=_any("transport_sockets.tls.v3.UpstreamTlsContext", context),
        ),
    )


def _any(kind: str, message: Message) -> Any:
    return Any(type_url=f"{_TYPE}{kind}", value=message.SerializeToString(deterministic=True))
