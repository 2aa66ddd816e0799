"""Compressed bodies at the edge."""

import gzip
import json
from pathlib import Path

from tests.support.pods import running_pod


async def test_read_body_decodes_compression_and_refuses_broken_bodies(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod") as pod:
        await pod.name("org/smol", "/files")
        body = gzip.compress(json.dumps({"model": "org/smol", "messages": []}).encode())
        for data, status in ((body, 200), (body[:20], 400), (b"not compressed at all", 400)):
            headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
            async with pod.http.post("/v1/chat/completions", data=data, headers=headers) as answer:
                assert answer.status == status, await answer.text()
                if status == 400:
                    assert (await answer.json())["error"]["message"].startswith("the body is")
        assert pod.runtime.bodies[-1]["model"] == "org/smol"
        assert "Content-Encoding" not in pod.runtime.headers[-1]


async def test_key_guard_answers_before_a_body_is_decoded(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", api_keys=("secret",)) as pod:
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        async with pod.http.post("/v1/chat/completions", data=b"not gzip", headers=headers) as answer:
            assert answer.status == 401
        headers["Authorization"] = "Bearer secret"
        async with pod.http.post("/v1/chat/completions", data=b"not gzip", headers=headers) as answer:
            assert answer.status == 400
        bomb = gzip.compress(bytes(50_000_000))
        async with pod.http.post("/v1/chat/completions", data=bomb, headers=headers) as answer:
            assert answer.status == 413
        headers["Content-Encoding"] = "br"
        async with pod.http.post("/v1/chat/completions", data=b"x", headers=headers) as answer:
            assert (answer.status, "'br' is not supported" in await answer.text()) == (400, True)
