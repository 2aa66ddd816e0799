"""TLS of a pod's listeners: callers check the pod, pods check each other, and new certificates are used without a restart."""

import asyncio
import ssl
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import grpc.aio
import pytest

from mesh.cli.supervised_process import status_of
from mesh.config.schema import MeshConfig
from mesh.errors import InvalidRequest
from mesh.pod.pod import Pod
from tests.support.envoy import EMBEDDED, WORKERS, running_in, until_carried
from tests.support.etcd import EtcdServer
from tests.support.pods import RunningPod, load_at_the_other, running_pod
from tests.support.tls import Authority, peer_settings
from tests.support.waiting import until
from wire.mmesh import model_mesh_pb2 as pb
from wire.mmesh.model_mesh_pb2_grpc import ModelMeshStub

FOR_M = (("mm-model-id", "m"),)


@pytest.fixture
async def pods(tmp_path: Path, etcd: EtcdServer) -> AsyncIterator[tuple[RunningPod, RunningPod]]:
    authority, store = Authority("mesh"), f"{etcd.url}/{uuid.uuid4().hex}"
    async with (
        running_pod(tmp_path / "a", store=store, **peer_settings(tmp_path / "tls-a", authority)) as a,
        running_pod(tmp_path / "b", store=store, **peer_settings(tmp_path / "tls-b", authority)) as b,
    ):
        await until(lambda: all(len(pod.pod.registry.instances.live()) == 2 for pod in (a, b)))
        yield a, b


@pytest.fixture(params=[EMBEDDED, WORKERS])
def mode(request: pytest.FixtureRequest) -> str:
    """Whether callers reach the pod's own listeners or those of its worker."""
    return str(request.param)


def listeners(mode: str, **settings: Any) -> dict[str, Any]:
    """Return the settings with one worker at most, so that all connections reach the same listener."""
    return {**settings, "workers": 1} if mode == WORKERS else settings


async def test_callers_use_tls_and_a_new_certificate_without_a_restart(tmp_path: Path, mode: str) -> None:
    authority, later = Authority("first"), Authority("second")
    certificate, key = authority.issue(tmp_path / "tls")
    trusted = authority.write(tmp_path / "ca.pem")
    settings = listeners(mode, trusted=trusted, tls_cert=certificate, tls_key=key)
    async with running_in(mode, tmp_path / "pod", **settings) as pod:
        await pod.register("m")
        assert await pod.echo("m") == b"hi"
        if mode == WORKERS:
            await until_carried(pod, "m")
        status, _, _ = await pod.chat("m")
        assert status == 200
        assert await status_of(f"127.0.0.1:{pod.pod.ports.http}", "/health", 5.0, tls=True) == 200, "as serve probes it"
        slow = pod.server_stream("/test.Any/Slow")(b"", metadata=FOR_M)
        assert await slow.read() == b"first"
        with pytest.raises(aiohttp.ClientError):
            async with aiohttp.ClientSession() as plain:
                await plain.get(f"http://127.0.0.1:{pod.pod.ports.http}/health")

        later.issue(tmp_path / "tls")
        context = ssl.create_default_context(cafile=later.write(tmp_path / "later.pem"))

        async def is_new() -> bool:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as fresh:
                try:
                    await fresh.get(f"https://127.0.0.1:{pod.pod.ports.http}/health")
                except aiohttp.ClientError:
                    return False
                return True

        async with asyncio.timeout(10):
            while not await is_new():
                await asyncio.sleep(0.05)
        credentials = grpc.ssl_channel_credentials((tmp_path / "later.pem").read_bytes())
        address = f"127.0.0.1:{pod.pod.ports.grpc}"
        async with grpc.aio.secure_channel(
            address, credentials, options=(("grpc.use_local_subchannel_pool", 1),)
        ) as fresh:
            echo: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = fresh.unary_unary("/test.Any/Echo")
            assert await echo(b"hi", metadata=FOR_M, timeout=5) == b"hi"
        assert not slow.done(), "streams go on over the connection that they have"
        slow.cancel()


async def test_callers_need_a_certificate_of_one_of_the_authorities(tmp_path: Path, mode: str) -> None:
    authority, others = Authority("server"), Authority("callers")
    certificate, key = authority.issue(tmp_path / "tls")
    trusted = authority.write(tmp_path / "ca.pem")
    client_ca = f"{trusted},{others.write(tmp_path / 'callers.pem')}"
    tls = listeners(mode, tls_cert=certificate, tls_key=key, tls_client_ca=client_ca)
    async with running_in(mode, tmp_path / "pod", trusted=trusted, **tls) as pod:
        for signer in (authority, others):
            held, held_key = (Path(path).read_bytes() for path in signer.issue(tmp_path / str(id(signer))))
            credentials = grpc.ssl_channel_credentials(trusted.read_bytes(), held_key, held)
            async with grpc.aio.secure_channel(f"127.0.0.1:{pod.pod.ports.grpc}", credentials) as channel:
                status = await ModelMeshStub(channel).getModelStatus(pb.GetStatusRequest(modelId="m"), timeout=5)
                assert status.status == pb.ModelStatusInfo.NOT_FOUND
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pod.management.getModelStatus(pb.GetStatusRequest(modelId="m"), timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(aiohttp.ClientError):
            await pod.http.get("/health")


async def test_callers_certificate_stands_for_no_key(tmp_path: Path, mode: str) -> None:
    authority = Authority("server")
    certificate, key = authority.issue(tmp_path / "tls")
    trusted = authority.write(tmp_path / "ca.pem")
    settings = listeners(mode, tls_cert=certificate, tls_key=key, tls_client_ca=str(trusted), api_keys=("secret",))
    async with running_in(mode, tmp_path / "pod", trusted=trusted, **settings) as pod:
        context = ssl.create_default_context(cafile=trusted)
        context.load_cert_chain(*authority.issue(tmp_path / "caller"))
        url = f"https://127.0.0.1:{pod.pod.ports.http}/v1/models"
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as caller:
            async with caller.get(url) as answer:
                assert answer.status == 401
            async with caller.get(url, headers={"Authorization": "Bearer secret"}) as answer:
                assert answer.status == 200


async def test_pods_trust_one_certificate_that_they_share(tmp_path: Path, etcd: EtcdServer) -> None:
    """As under ModelMesh's controller, which gives its pods one certificate and no authority."""
    store = f"{etcd.url}/{uuid.uuid4().hex}"
    authority = Authority("company")
    certificate, key = authority.issue(tmp_path / "tls", "modelmesh-serving.models.svc")
    settings = {
        "peer_grpc_listen": "127.0.0.1:0",
        "peer_http_listen": "127.0.0.1:0",
        "peer_tls_cert": certificate,
        "peer_tls_key": key,
        "peer_tls_ca": certificate,
        "peer_tls_name": "",
    }
    stranger = authority.issue(tmp_path / "stranger", "modelmesh-serving.models.svc")
    async with (
        running_pod(tmp_path / "a", store=store, **settings) as a,  # type: ignore[arg-type]
        running_pod(tmp_path / "b", store=store, **settings) as b,  # type: ignore[arg-type]
    ):
        await load_at_the_other(a, b, "m")
        assert await a.echo("m") == b"hi"
        assert (await a.chat("m"))[0] == 200
        assert b.runtime.calls["m"] == 2
        context = ssl.create_default_context(cafile=authority.write(tmp_path / "ca.pem"))
        context.load_cert_chain(*stranger)
        context.check_hostname = False
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
            with pytest.raises(aiohttp.ClientError):
                await session.post(f"https://127.0.0.1:{b.pod.http.peer_port}/models/load", json={"model": "m"})


async def test_pods_forward_and_load_over_mutual_tls(pods: tuple[RunningPod, RunningPod]) -> None:
    a, b = pods
    await a.register("m")
    await b.pod.registry.models.find("m")
    await b.pod.placement.ensure_loaded("m", wait=True, local_only=True)
    await until(lambda: any(copy.model.state == "loaded" for copy in a.pod.states.status("m").copies))
    assert await a.echo("m") == b"hi"
    status, body, _ = await a.chat("m")
    assert (status, body["answer"]) == (200, "m")
    assert b.runtime.calls["m"] == 2
    record = b.pod.registry.instances.get(b.pod.instance_id)
    assert record is not None
    assert record.peer_grpc_address.endswith(f":{b.pod.grpc.peer_port}")


async def test_pods_use_a_new_certificate_for_new_connections(
    pods: tuple[RunningPod, RunningPod], tmp_path: Path
) -> None:
    a, b = pods
    await a.register("m")
    await b.pod.registry.models.find("m")
    await b.pod.placement.ensure_loaded("m", wait=True, local_only=True)
    await until(lambda: any(copy.model.state == "loaded" for copy in a.pod.states.status("m").copies))
    stream = a.server_stream("/test.Any/Slow")(b"", metadata=FOR_M)
    assert await stream.read() == b"first"
    renewed = Authority("renewed")
    for name in ("tls-a", "tls-b"):
        renewed.issue(tmp_path / name)
        renewed.write(tmp_path / name / "ca.pem")
    identities = [pod.pod.access.peer_tls for pod in pods]
    await until(lambda: all(identity is not None and identity.generation == 1 for identity in identities))
    for _ in range(5):
        assert await a.echo("m") == b"hi"
    assert not stream.done()
    stream.cancel()


@pytest.mark.parametrize("kind", ["none", "foreign"])
async def test_peer_listener_refuses_strangers(pods: tuple[RunningPod, RunningPod], tmp_path: Path, kind: str) -> None:
    b = pods[1].pod
    await pods[1].register("m")
    trusted = (tmp_path / "tls-b" / "ca.pem").read_bytes()
    context = ssl.create_default_context(cadata=trusted.decode())
    credentials = grpc.ssl_channel_credentials(trusted)
    if kind == "foreign":
        certificate, key = Authority("foreign").issue(tmp_path / "foreign")
        context.load_cert_chain(certificate, key)
        credentials = grpc.ssl_channel_credentials(trusted, Path(key).read_bytes(), Path(certificate).read_bytes())
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as stranger:
        with pytest.raises(aiohttp.ClientError):
            async with stranger.post(
                f"https://127.0.0.1:{b.http.peer_port}/models/load", json={"model": "m"}
            ) as answer:
                await answer.read()
    async with grpc.aio.secure_channel(f"127.0.0.1:{b.grpc.peer_port}", credentials) as channel:
        echo: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/test.Any/Echo")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await echo(b"hi", metadata=FOR_M, timeout=3)
        assert refused.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    assert pods[1].runtime.loaded == {}


async def test_pod_with_another_name_in_its_certificate_is_not_a_peer(tmp_path: Path, etcd: EtcdServer) -> None:
    authority, store = Authority("mesh"), f"{etcd.url}/{uuid.uuid4().hex}"
    async with (
        running_pod(tmp_path / "a", store=store, **peer_settings(tmp_path / "tls-a", authority)) as a,
        running_pod(tmp_path / "b", store=store, **peer_settings(tmp_path / "tls-b", authority, "other")) as b,
    ):
        await load_at_the_other(a, b, "m")
        assert await a.echo("m") == b"hi"
        assert b.runtime.calls["m"] == 0, "it was loaded here instead"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"tls_cert": "CERT"}, "tls_key is missing"),
        (
            {"peer_tls_cert": "CERT", "peer_tls_key": "KEY"},
            "peer_tls_ca, peer_grpc_listen, peer_http_listen is missing",
        ),
        ({"tls_cert": "CERT", "tls_key": "KEY", "store": "etcd://127.0.0.1:1"}, "needs a listener for other pods"),
    ],
)
def test_tls_settings_that_do_not_fit_together_are_refused(tmp_path: Path, given: dict[str, str], named: str) -> None:
    certificate, key = Authority("ca").issue(tmp_path)
    values = {name: value.replace("CERT", certificate).replace("KEY", key) for name, value in given.items()}
    settings: dict[str, Any] = {"store": str(tmp_path / "store"), **values}
    with pytest.raises(InvalidRequest, match=named):
        Pod(MeshConfig(**settings))
