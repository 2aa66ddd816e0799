"""The HTTP gateway of a pod over a fake runtime: held requests, limits and keys. Model routes are in test_models_routes."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.envoy import EMBEDDED, MODES, running_in, until_carried
from tests.support.fake_runtime import MB, Switches
from tests.support.pods import RunningPod, running_pod
from tests.support.waiting import until, until_async


@pytest.fixture
async def pod(tmp_path: Path) -> AsyncIterator[RunningPod]:
    async with running_pod(tmp_path / "pod", keep_alive_s=0.1, failure_expiry_s=60.0) as running:
        await running.name("org/smol", "/files")
        yield running


@pytest.fixture(params=MODES)
async def either(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[RunningPod]:
    """A pod with a loaded model, which its callers reach directly, through Envoy or through workers."""
    async with running_in(request.param, tmp_path / "pod", keep_alive_s=0.1, failure_expiry_s=60.0) as running:
        await running.name("org/smol", "/files")
        if request.param != EMBEDDED:
            await until_carried(running, "org/smol")
        yield running


async def stream(pod: RunningPod, model: str = "org/smol", **body: Any) -> tuple[int, str]:
    async with pod.http.post("/v1/chat/completions", json={"model": model, "stream": True, **body}) as answer:
        return answer.status, await answer.text()


def events(text: str) -> list[Any]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ") and line != "data: [DONE]"]


async def test_gateway_routes_by_the_bodys_model(either: RunningPod) -> None:
    model_id = (await either.model("org/smol"))["model_id"]
    status, body, headers = await either.chat("org/smol", messages=[{"role": "user", "content": "hi"}])
    assert (status, body["answer"], body["path"]) == (200, model_id, "/v1/chat/completions")
    assert headers["X-Request-Id"] == body["id"]
    # the body is passed on as it came
    assert either.runtime.bodies[-1] == {"model": "org/smol", "messages": [{"role": "user", "content": "hi"}]}


async def test_gateway_keeps_the_clients_request_id(either: RunningPod) -> None:
    async with either.http.post(
        "/v1/completions", json={"model": "org/smol"}, headers={"X-Request-Id": "mine"}
    ) as answer:
        assert answer.headers["X-Request-Id"] == "mine"
        assert (await answer.json())["id"] == "mine"


async def test_gateway_relays_a_whole_stream(either: RunningPod) -> None:
    status, text = await stream(either, chunks=50)
    assert status == 200
    assert [event["n"] for event in events(text)] == list(range(50))
    assert text.endswith("data: [DONE]\n\n")


async def test_gateway_stream_begins_with_comments_during_the_load(pod: RunningPod) -> None:
    gate = pod.runtime.switches.load_gate = asyncio.Event()
    pod.runtime.switches.progress = 0.42
    async with pod.http.post("/v1/chat/completions", json={"model": "org/smol", "stream": True}) as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        seen = b""
        while b"pulling 42 % of the files" not in seen:
            seen += await answer.content.readany()
        gate.set()
        text = (seen + await answer.read()).decode()
    assert [event["n"] for event in events(text)] == [0, 1, 2]
    assert text.startswith(": ")


async def test_gateway_request_without_stream_waits(pod: RunningPod) -> None:
    gate = pod.runtime.switches.load_gate = asyncio.Event()
    waiting = asyncio.ensure_future(pod.chat("org/smol"))
    model_id = (await pod.model("org/smol"))["model_id"]
    await until(lambda: pod.runtime.loading and pod.pod.copies.num_waiting(model_id) == 1)
    assert not waiting.done()
    gate.set()
    assert (await waiting)[0] == 200


async def test_gateway_wait_budget_ends_in_503_or_an_error_event(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", wait_budget_s=0.4, keep_alive_s=0.1) as pod:
        await pod.name("smol", "/files")
        gate = pod.runtime.switches.load_gate = asyncio.Event()
        status, body, headers = await pod.chat("smol")
        assert status == 503
        assert "wait budget of 0.4 s" in body["error"]["message"]
        assert 1 <= int(headers["Retry-After"]) <= 120
        status, text = await stream(pod, "smol")
        assert status == 200
        assert "wait budget" in events(text)[-1]["error"]["message"]
        assert "[DONE]" not in text
        gate.set()


async def test_gateway_retry_hint_comes_from_the_answer_that_holds_the_memory(tmp_path: Path) -> None:
    switches = Switches(capacity_bytes=15 * MB, chunk_s=600.0, sequences=1, busy_s=95.0)
    async with running_pod(tmp_path / "pod", switches=switches, wait_budget_s=0.4) as pod:
        for name in ("held", "wanted"):
            await pod.name(name, f"/{name}")
        answer = asyncio.create_task(pod.chat("held", stream=True))
        await until(lambda: pod.runtime.calls)
        await until(lambda: pod.pod.monitor.busy_s(next(iter(pod.runtime.loaded))) == 95.0)
        status, _, headers = await pod.chat("wanted")
        assert status == 503
        assert 95 <= int(headers["Retry-After"]) <= 110
        answer.cancel()


@pytest.mark.parametrize(("cause", "hinted"), [("missing", False), ("crashed", True)])
async def test_gateway_sends_no_retry_hint_where_time_does_not_help(tmp_path: Path, cause: str, hinted: bool) -> None:
    async with running_pod(tmp_path / "pod", failure_expiry_s=60.0) as pod:
        await pod.name("smol", "/files")
        if cause == "missing":
            pod.runtime.switches.fail["/files"] = "no such files"
        else:
            pod.runtime.switches.crash.add("/files")
        for _ in range(2):  # from the load, and from its record
            status, _, headers = await pod.chat("smol")
            assert (status, "Retry-After" in headers) == (424, hinted)


async def test_gateway_load_failure_has_its_own_status(pod: RunningPod) -> None:
    pod.runtime.switches.fail["/files"] = "weights are truncated"
    status, body, _ = await pod.chat("org/smol")
    assert status == 424
    assert "weights are truncated" in body["error"]["message"]
    assert body["error"]["type"] == "model_load_error"
    # a failure that is known gets its own status on a stream too
    status, text = await stream(pod)
    assert status == 424
    assert "weights are truncated" in json.loads(text)["error"]["message"]


async def test_gateway_load_failure_after_the_stream_began(pod: RunningPod) -> None:
    gate = pod.runtime.switches.load_gate = asyncio.Event()
    pod.runtime.switches.fail["/files"] = "weights are truncated"
    async with pod.http.post("/v1/chat/completions", json={"model": "org/smol", "stream": True}) as answer:
        await answer.content.readany()
        gate.set()
        text = (await answer.read()).decode()
    assert "weights are truncated" in events(text)[-1]["error"]["message"]


async def test_gateway_disconnect_cancels_the_request(either: RunningPod) -> None:
    await either.chat("org/smol")
    either.runtime.switches.chunk_s = 0.05
    answer = await either.http.post("/v1/chat/completions", json={"model": "org/smol", "stream": True, "chunks": 1000})
    await answer.content.readany()
    answer.close()
    await until(lambda: either.runtime.cancelled)
    model_id = (await either.model("org/smol"))["model_id"]
    await until(lambda: either.pod.copies.in_flight(model_id) == 0)


async def test_gateway_disconnect_while_waiting_does_not_stop_the_load(pod: RunningPod) -> None:
    gate = pod.runtime.switches.load_gate = asyncio.Event()
    model_id = (await pod.model("org/smol"))["model_id"]
    answer = await pod.http.post("/v1/chat/completions", json={"model": "org/smol", "stream": True})
    await answer.content.readany()
    answer.close()
    await until(lambda: pod.pod.copies.num_waiting(model_id) == 0)
    gate.set()
    await until(lambda: model_id in pod.runtime.loaded)
    assert pod.runtime.bodies == []


async def test_gateway_hides_a_lost_model_and_one_unavailable_response(pod: RunningPod) -> None:
    model_id = (await pod.model("org/smol"))["model_id"]
    assert (await pod.chat("org/smol"))[0] == 200
    pod.runtime.drop(model_id)
    assert (await pod.chat("org/smol"))[0] == 200
    pod.runtime.switches.unavailable = 1
    assert (await pod.chat("org/smol"))[0] == 200
    pod.runtime.switches.unavailable = 2
    assert (await pod.chat("org/smol"))[0] == 503
    assert (pod.runtime.refusals, pod.runtime.switches.unavailable) == (3, 0)


async def test_gateway_unknown_path_loads_nothing(pod: RunningPod) -> None:
    for body in ({"model": "org/smol"}, {}):
        async with pod.http.post("/v1/nothing", json=body) as answer:
            assert (answer.status, (await answer.json())["error"]["message"]) == (404, "POST /v1/nothing: Not Found")
    assert pod.runtime.bodies == []
    assert pod.runtime.loaded == {}


async def test_gateway_unknown_path_of_a_foreign_runtime_reloads_nothing(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", foreign=True) as pod:
        await pod.name("smol", "/files")
        assert (await pod.chat("smol"))[0] == 200
        log = list(pod.runtime.log)
        async with pod.http.post("/v1/nothing", json={"model": "smol"}) as answer:
            assert (answer.status, (await answer.json())["error"]["message"]) == (404, "no such path")
        assert pod.runtime.log == log


@pytest.mark.parametrize(
    ("method", "path", "status", "allowed"),
    [
        ("GET", "/v1/nothing", 404, None),
        ("GET", "/v1/chat/completions", 405, "POST"),
        ("PUT", "/v1/audio/speech", 405, "POST"),
        ("DELETE", "/v1/models/org/smol", 405, "GET,HEAD"),
    ],
)
async def test_http_server_knows_the_methods_of_its_paths(
    pod: RunningPod, method: str, path: str, status: int, allowed: str | None
) -> None:
    async with pod.http.request(method, path) as answer:
        assert (answer.status, answer.headers.get("Allow")) == (status, allowed)


async def test_gateway_runtime_without_http(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", runtime_http="") as pod:
        await pod.name("smol", "/files")
        status, body, _ = await pod.chat("smol")
        assert status == 501
        assert "gRPC" in body["error"]["message"]


async def test_gateway_errors_of_messages_have_that_protocols_marks(pod: RunningPod) -> None:
    async with pod.http.post("/v1/messages", json={"model": "nobody"}) as answer:
        found = await answer.json()
    assert (answer.status, found["type"], found["error"]["type"]) == (404, "error", "not_found_error")
    async with pod.http.post("/v1/messages", data=b"{") as answer:
        assert (await answer.json())["error"]["type"] == "invalid_request_error"
    body = {"model": "org/smol", "stream": True, "chunks": 5, "break_at": 2}
    async with pod.http.post("/v1/messages", json=body) as answer:
        last = (await answer.text()).rstrip("\n").split("\n\n")[-1]
    name, _, data = last.partition("\ndata: ")
    assert (name, json.loads(data)["type"]) == ("event: error", "error")


async def test_gateway_broken_stream_ends_in_an_error_event(pod: RunningPod) -> None:
    status, text = await stream(pod, chunks=5, break_at=2)
    assert status == 200
    assert [event["n"] for event in events(text)[:-1]] == [0, 1, 2]
    assert "broke off" in events(text)[-1]["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"{", 400, "not valid JSON"),
        (b'{"messages": []}', 400, "model is missing"),
        (b'{"model": 7}', 400, "$.model"),
        (b'{"model": "nope"}', 404, "served here: org/smol"),
        (b"\xff\xfe", 400, "JSON"),
    ],
)
async def test_gateway_refuses_bad_requests(pod: RunningPod, body: bytes, status: int, text: str) -> None:
    async with pod.http.post("/v1/chat/completions", data=body) as answer:
        assert answer.status == status
        error = (await answer.json())["error"]
        assert text in error["message"]
        assert error["type"] == "invalid_request_error"
        assert answer.headers["X-Request-Id"]


async def test_read_body_refuses_a_body_over_the_limit(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", http_max_body_bytes=1000) as pod:
        async with pod.http.post("/v1/completions", data=io.BytesIO(b"x" * 100_000_000)) as answer:
            assert answer.status == 413
            assert "1000 bytes" in (await answer.json())["error"]["message"]

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(11):
                yield b"x" * 100

        async with pod.http.post("/v1/completions", data=chunks()) as answer:
            assert answer.status == 413


async def test_http_server_survives_half_a_request(pod: RunningPod) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", pod.pod.http.port)
    writer.write(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"model": "org')
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    assert (await pod.chat("org/smol"))[0] == 200


async def test_http_server_answers_unknown_paths_in_json(pod: RunningPod) -> None:
    async with pod.http.get("/nothing") as answer:
        assert answer.status == 404
        assert (await answer.json())["error"]["message"]
    async with pod.http.delete("/v1/models") as answer:
        assert answer.status == 405
        assert "GET" in answer.headers["Allow"]


async def test_health_serves_probes_and_metrics(pod: RunningPod) -> None:
    for path in ("/health", "/healthz", "/readyz"):
        async with pod.http.get(path) as answer:
            assert answer.status == 200
    await pod.chat("org/smol")
    async with pod.http.get("/metrics") as answer:
        text = await answer.text()
    assert 'repertory_mesh_requests_total{carrier="http",code="200",model_name="org/smol"} 1.0' in text
    assert 'repertory_mesh_loads_total{model_name="org/smol",outcome="loaded"} 1.0' in text
    assert 'repertory_mesh_in_flight_requests{model_name="org/smol"} 0.0' in text
    assert "modelmesh_instance_models_total 1.0" in text
    assert "modelmesh_models_managed_total 1.0" in text
    assert "vllm:num_requests_running 3" in text
    async with pod.http.head("/metrics") as answer:
        assert answer.status == 200
    async with pod.http.delete("/admin/v1/models/org/smol") as answer:
        assert answer.status == 204
    async with pod.http.get("/metrics") as answer:
        assert 'model_name="org/smol"' not in await answer.text()


async def test_health_is_not_ready_without_a_runtime(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod") as pod:
        await pod.runtime.stop()
        await until(lambda: not pod.pod.is_ready())
        async with pod.http.get("/readyz") as answer:
            assert answer.status == 503
        async with pod.http.get("/healthz") as answer:
            assert answer.status == 200


async def test_key_guard_protects_all_http_but_health(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", api_keys=("secret",)) as pod:
        for path in ("/v1/models", "/metrics", "/admin/v1/models", "/models", "/nothing"):
            async with pod.http.get(path) as answer:
                assert answer.status == 401, path
                assert "secret" not in await answer.text()
        async with pod.http.get("/health") as answer:
            assert answer.status == 200
        async with pod.http.get("/v1/models", headers={"Authorization": "Bearer secret"}) as answer:
            assert answer.status == 200
        for headers in ({"Authorization": "Bearer "}, {"x-api-key": ""}, {"x-api-key": "other"}):
            async with pod.http.get("/v1/models", headers=headers) as answer:
                assert answer.status == 401
        async with pod.http.get("/v1/models", headers={"x-api-key": "secret"}) as answer:
            assert answer.status == 200


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens", "/v1/responses"])
async def test_gateway_forwards_every_protocol_by_model(pod: RunningPod, path: str) -> None:
    async with pod.http.post(path, json={"model": "org/smol"}, headers={"x-api-key": "secret"}) as answer:
        assert (answer.status, (await answer.json())["path"]) == (200, path)
    assert "x-api-key" not in {key.lower() for key in pod.runtime.headers[-1]}


async def test_gateway_disconnect_after_done_is_not_a_cancellation(pod: RunningPod) -> None:
    """As OpenAI's own client does: it closes when it has read [DONE], before the stream's end."""

    async def leave_after(last: bytes) -> None:
        async with pod.http.post("/v1/chat/completions", json={"model": "org/smol", "stream": True}) as answer:
            async for line in answer.content:
                if line.startswith(last):
                    break
            answer.close()

    async def counted(code: str) -> bool:
        async with pod.http.get("/metrics") as answer:
            return (
                f'repertory_mesh_requests_total{{carrier="http",code="{code}",model_name="org/smol"}} 1.0'
                in await answer.text()
            )

    pod.runtime.switches.end_s = 60.0
    await leave_after(b"data: [DONE]")

    async def is_counted() -> bool:
        return await counted("200") or await counted("CANCELLED")

    await until_async(is_counted)
    assert await counted("200")
    pod.runtime.switches.chunk_s = 60.0
    await leave_after(b": ")
    await until_async(lambda: counted("CANCELLED"), timeout_s=30)
