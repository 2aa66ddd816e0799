"""What Envoy's listeners do for the mesh: TLS, client certificates, limits, and errors of a mesh that is down."""

import ssl
from pathlib import Path

import aiohttp
import grpc
import grpc.aio
import pytest

from tests.support.envoy import num_through_mesh, running_envoy_pod, until_carried
from tests.support.tls import Authority
from tests.support.waiting import until_async

FOR_M = (("mm-model-id", "m"),)


async def test_callers_use_tls_and_a_new_certificate_without_a_restart(tmp_path: Path) -> None:
    authority, later = Authority("first"), Authority("second")
    certificate, key = authority.issue(tmp_path / "tls")
    trusted = authority.write(tmp_path / "ca.pem")
    async with running_envoy_pod(tmp_path / "pod", trusted=trusted, tls_cert=certificate, tls_key=key) as pod:
        await pod.register("m")
        await until_carried(pod, "m")
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
                    async with fresh.get(f"https://127.0.0.1:{pod.pod.ports.http}/health") as answer:
                        return answer.status == 200
                except aiohttp.ClientError:
                    return False

        await until_async(is_new)
        assert not slow.done(), "streams go on over the connection that they have"
        slow.cancel()


async def test_callers_need_a_certificate_where_the_settings_ask_for_one(tmp_path: Path) -> None:
    authority, clients = Authority("servers"), Authority("clients")
    certificate, key = authority.issue(tmp_path / "server")
    trusted = authority.write(tmp_path / "ca.pem")
    own = clients.issue(tmp_path / "client", "somebody")
    clients_ca = str(clients.write(tmp_path / "clients.pem"))
    async with running_envoy_pod(
        tmp_path / "pod", trusted=trusted, tls_cert=certificate, tls_key=key, tls_client_ca=clients_ca
    ) as pod:
        url = f"https://127.0.0.1:{pod.pod.ports.http}/health"
        context = ssl.create_default_context(cafile=trusted)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as without:
            with pytest.raises(aiohttp.ClientError):
                await without.get(url)
        context = ssl.create_default_context(cafile=trusted)
        context.load_cert_chain(*own)
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session,
            session.get(url) as answer,
        ):
            assert answer.status == 200


async def test_bodies_over_the_limit_get_the_meshs_answer(tmp_path: Path) -> None:
    async with running_envoy_pod(tmp_path / "pod", http_max_body_bytes=600_000) as pod:
        await pod.register("m")
        await until_carried(pod, "m")
        before = await num_through_mesh(pod, "m")
        status, _, _ = await pod.chat("m", messages=[{"role": "user", "content": "x" * 500_000}])
        assert (status, await num_through_mesh(pod, "m")) == (200, before), "Envoy holds a body up to the limit"
        status, body, _ = await pod.chat("m", messages=[{"role": "user", "content": "x" * 600_000}])
        assert status == 413
        assert "the limit is 600000 bytes" in body["error"]["message"]


async def test_envoy_says_in_the_protocols_shape_that_the_mesh_is_down(tmp_path: Path) -> None:
    async with running_envoy_pod(tmp_path / "pod") as pod:
        await pod.pod.http.stop()
        async with pod.http.get("/v1/models") as answer:
            assert answer.status == 503
            assert (await answer.json())["error"]["type"] == "unavailable_error"
        await pod.pod.grpc.stop(0)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await pod.echo("none")
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
