"""Requests whose target is a whole address (`GET http://host/path`), as clients of a proxy send it."""

import asyncio
import json
from pathlib import Path

import pytest

from tests.support.envoy import EMBEDDED, WORKERS, running_in, until_carried
from tests.support.pods import RunningPod


async def body_of(pod: RunningPod, method: str, path: str, body: bytes = b"") -> dict[str, object]:
    """Send a request with a whole address as its target, and return the JSON of a response with status 200."""
    host = f"127.0.0.1:{pod.pod.ports.http}"
    reader, writer = await asyncio.open_connection("127.0.0.1", pod.pod.ports.http)
    head = (
        f"{method} http://{host}{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    )
    writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    async with asyncio.timeout(10):
        answered_head, _, answered = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert answered_head.startswith(b"HTTP/1.1 200"), answered_head
    found: dict[str, object] = json.loads(answered)
    return found


@pytest.mark.parametrize("mode", [EMBEDDED, WORKERS])
async def test_whole_address_as_target_is_forwarded_as_its_path(tmp_path: Path, mode: str) -> None:
    async with running_in(mode, tmp_path / "pod") as pod:
        await pod.register("m")
        await pod.load("m")
        if mode == WORKERS:
            await until_carried(pod, "m")
        assert (await body_of(pod, "POST", "/v1/completions", b'{"model": "m"}'))["path"] == "/v1/completions"
        assert (await body_of(pod, "GET", "/v1/models?x=%2F"))["object"] == "list"
