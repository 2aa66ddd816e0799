"""The ports beside the main ones: ModelMesh's probes and preStop hook, and metrics by HTTP or HTTPS."""

import asyncio
import ssl
from pathlib import Path

import aiohttp
import pytest

from mesh.registry.records import InstanceRecord
from mesh.registry.table import Table
from tests.support.pods import RunningPod, running_pod
from tests.support.waiting import until_async

ANY = "127.0.0.1:0"
FOR_M = (("mm-model-id", "m"),)


async def status_of(url: str) -> int:
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status


def url_of(pod: RunningPod, index: int, path: str) -> str:
    return f"http://127.0.0.1:{pod.pod.side_ports[index].port}{path}"


async def test_probes_follow_the_pods_life(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", probe_listen=ANY, api_keys=("secret",)) as pod:
        ready, live = url_of(pod, 0, "/ready"), url_of(pod, 0, "/live")
        assert (await status_of(ready), await status_of(live)) == (200, 200)
        await pod.runtime.stop()

        async def is_unready() -> bool:
            return await status_of(ready) == 503

        await until_async(is_unready)
        assert await status_of(live) == 200


async def test_probes_a_new_pod_is_not_ready_while_another_leaves(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", probe_listen=ANY) as pod:
        leaving: Table[InstanceRecord] = pod.pod.registry.instances.table
        await leaving.update("old", lambda _: InstanceRecord(shutting_down=True))
        assert await status_of(url_of(pod, 0, "/ready")) == 503
        await leaving.update("old", lambda _: None)
        assert await status_of(url_of(pod, 0, "/ready")) == 200
        await leaving.update("old", lambda _: InstanceRecord(shutting_down=True))
        assert await status_of(url_of(pod, 0, "/ready")) == 200, "a pod that has been ready stays so"


async def test_prestop_answers_when_the_last_request_has_ended(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", prestop_listen=ANY, grace_s=20) as pod:
        await pod.register("m")
        pod.runtime.switches.chunk_s = 0.1
        call = pod.server_stream("/test.Any/Count")(b"10", metadata=FOR_M)
        assert await call.read() == b"0"
        hook = asyncio.create_task(status_of(url_of(pod, 0, "/prestop")))
        stopping = asyncio.create_task(pod.pod.stop())
        last = b""
        while isinstance(message := await call.read(), bytes):
            last = message
        assert last == b"9", "the runtime is needed until the stream has ended"
        assert not hook.done()
        assert await hook == 200
        await stopping


async def test_prestop_gives_up_after_twice_the_grace_period(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", prestop_listen=ANY, grace_s=0.1) as pod:
        assert await status_of(url_of(pod, 0, "/prestop")) == 200


@pytest.mark.parametrize("tls", [False, True])
async def test_metrics_have_a_port_of_their_own(tmp_path: Path, tls: bool) -> None:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    async with (
        running_pod(tmp_path / "pod", metrics_listen=ANY, metrics_tls=tls, api_keys=("secret",)) as pod,
        aiohttp.ClientSession() as session,
    ):
        url = f"http{'s' if tls else ''}://127.0.0.1:{pod.pod.side_ports[0].port}/metrics"
        async with session.get(url, ssl=context) as answer:
            assert "modelmesh_instance_models_total 0.0" in await answer.text()


async def test_side_port_in_use_is_named(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", probe_listen=ANY) as pod:
        address = f"127.0.0.1:{pod.pod.side_ports[0].port}"
        with pytest.raises(OSError, match=f"metrics address {address}"):
            async with running_pod(tmp_path / "other", metrics_listen=address):
                pass
