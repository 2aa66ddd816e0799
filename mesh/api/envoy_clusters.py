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
from mesh.envoy.routes import MODEL_HEADERS, PEER_HEADER
from wire import envoy_pb2 as pb

CLUSTER_TYPE = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
_TYPE = "type.googleapis.com/envoy.extensions."
_UNLIMITED = UInt32Value(value=1_000_000_000)
_CONNECT_S = 2
_PING_S = 2
_PONG_S = 4
_NAMESPACE = "repertory"
_SOCKET_MATCH = "envoy.transport_socket_match"
# The headers that an endpoint gets, by the keys of its values.
_MODEL_HEADERS = {
    Carrier.GRPC: {"mm-model-id": "model", "mm-model-id-bin": "model_bin"},
    Carrier.HTTP: {"mm-model-id": "model"},
}
_PEER_HEADERS = {"repertory-hop": "hop", "repertory-peer-key": "peer_key"}


@dataclass(frozen=True, slots=True)
class PeerTls:
    """This pod's certificate towards other pods, and the name that theirs must carry."""

    material: TlsMaterial
    peer_name: str


def encoded(cluster: Cluster, peer_tls: PeerTls | None) -> bytes:
    """Return the serialised cluster. `peer_tls` is for endpoints that expect a certificate."""
    message = pb.Cluster(
        name=cluster.name,
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
        _protocol_options(cluster.carrier, meets_peers=_meets_peers(cluster), pings=cluster.pings)
    )
    if peer_tls is not None and any(endpoint.secure for tier in cluster.tiers for endpoint in tier):
        message.transport_socket_matches.append(_secure_socket(peer_tls, cluster.carrier))
    return message.SerializeToString(deterministic=True)


def _answering(cluster: Cluster) -> list[str]:
    """Return what answers a call in each tier, as the statistics of keys name it. The last tier is the mesh."""
    return [*["copy"] * (len(cluster.tiers) - 1), "mesh"]


def _meets_peers(cluster: Cluster) -> bool:
    """Return whether calls of the cluster come from other pods or may go to one, so that they have headers that only peers send."""
    return cluster.from_peers or any(endpoint.hop or endpoint.peer_key for tier in cluster.tiers for endpoint in tier)


def _endpoint(endpoint: Endpoint, by: str) -> pb.LbEndpoint:
    address = parse_address(endpoint.address)
    found = (
        pb.Address(pipe=pb.Pipe(path=address.path))
        if address.path
        else pb.Address(socket_address=pb.SocketAddress(address=address.host, port_value=address.port))
    )
    values = Struct()
    values.update(
        {
            "model": endpoint.model,
            "model_bin": base64.b64encode(endpoint.model.encode()).decode(),
            "hop": endpoint.hop,
            "peer_key": endpoint.peer_key,
            "by": by,
        }
    )
    metadata = pb.Metadata(filter_metadata={_NAMESPACE: values})
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
    """Return the protocol of the endpoints, and the filter that writes their headers once an endpoint is chosen.

    Each header that is written costs every call about a microsecond, so that clusters without peers have the fewest.
    """
    is_grpc = carrier is Carrier.GRPC
    config = (
        pb.ExplicitHttpConfig(
            http2_protocol_options=pb.Http2ProtocolOptions(connection_keepalive=_keep_alive() if pings else None)
        )
        if is_grpc
        else pb.ExplicitHttpConfig(http_protocol_options=pb.Http1ProtocolOptions())
    )
    # A call may have been tried at an endpoint of an earlier version of this cluster, which wrote peers' headers.
    removed = (*(() if is_grpc else (MODEL_HEADERS[Carrier.HTTP],)), PEER_HEADER, *_PEER_HEADERS)
    written = {**_MODEL_HEADERS[carrier], **(_PEER_HEADERS if meets_peers else {})}
    mutations = [
        *(pb.HeaderMutation(remove=header) for header in removed),
        *(pb.HeaderMutation(append=_overwriting(header, key)) for header, key in written.items()),
    ]
    writer = pb.HeaderMutationFilter(mutations=pb.Mutations(request_mutations=mutations))
    return _any(
        "upstreams.http.v3.HttpProtocolOptions",
        pb.HttpProtocolOptions(
            explicit_http_config=config,
            http_filters=[
                pb.HttpFilter(
                    name="endpoint_headers",  # another name than the listeners' filter, which routes switch off by its name
                    typed_config=_any("filters.http.header_mutation.v3.HeaderMutation", writer),
                ),
                pb.HttpFilter(
                    name="envoy.filters.http.upstream_codec",
                    typed_config=_any("filters.http.upstream_codec.v3.UpstreamCodec", pb.UpstreamCodec()),
                ),
            ],
        ),
    )


def _overwriting(header: str, key: str) -> pb.HeaderValueOption:
    value = pb.HeaderValue(key=header, value=f"%UPSTREAM_METADATA({_NAMESPACE}:{key})%")
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
