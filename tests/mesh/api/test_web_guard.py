"""Web pages at a pod's HTTP port: foreign ones change nothing, configured ones may call and read."""

from pathlib import Path

import pytest

from tests.support.pods import running_pod

CHANGES = (
    ("POST", "/v1/chat/completions"),
    ("POST", "/models/load"),
    ("POST", "/models/unload"),
    ("POST", "/admin/v1/models"),
    ("PUT", "/admin/v1/aliases/a"),
    ("DELETE", "/admin/v1/models/m"),
    ("POST", "/nothing"),
    ("GET", "/info"),  # loads the only model
    ("GET", "/v2/models/m"),
)


async def test_web_guard_leaves_probes_alone(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod") as pod:
        for path in ("/health", "/healthz", "/readyz", "/v2/health/ready"):
            async with pod.http.get(path, headers={"Host": "any.example", "Origin": "http://evil.example"}) as answer:
                assert answer.status == 200


@pytest.mark.parametrize(
    "headers",
    [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}],
    ids=str,
)
async def test_web_guard_refuses_foreign_pages_without_keys(tmp_path: Path, headers: dict[str, str]) -> None:
    async with running_pod(tmp_path / "pod") as pod:
        await pod.name("m", "/files")
        for method, path in CHANGES:
            sent = {"Content-Type": "text/plain", **headers}
            async with pod.http.request(method, path, data=b'{"model": "m"}', headers=sent) as answer:
                assert answer.status == 403, (method, path)
                assert "Access-Control-Allow-Origin" not in answer.headers
        assert pod.runtime.log == [("purge", "")]
        assert (await pod.model("m"))["name"] == "m"


async def test_web_guard_leaves_callers_with_a_key_alone(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", api_keys=("k",)) as pod:
        headers = {"Origin": "http://elsewhere.example", "Authorization": "Bearer k"}
        async with pod.http.post("/models/load", json={"model": "m"}, headers=headers) as answer:
            assert answer.status == 404
        headers["Authorization"] = "Bearer other"
        async with pod.http.post("/models/load", json={"model": "m"}, headers=headers) as answer:
            assert answer.status == 401


async def test_web_guard_serves_configured_origins(tmp_path: Path) -> None:
    origin = "https://chat.example"
    async with running_pod(tmp_path / "pod", cors_origins=(origin,), api_keys=("k",)) as pod:
        asked = {
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        async with pod.http.options("/v1/chat/completions", headers=asked) as answer:
            assert answer.status == 204
            assert answer.headers["Access-Control-Allow-Origin"] == origin
            assert answer.headers["Access-Control-Allow-Headers"] == "authorization,content-type"
        async with pod.http.options(
            "/v1/chat/completions", headers={**asked, "Origin": "https://evil.example"}
        ) as answer:
            assert answer.status == 401
            assert "Access-Control-Allow-Origin" not in answer.headers
        key = {"Authorization": "Bearer k"}
        async with pod.http.post("/admin/v1/models", json={"name": "m", "uri": "/m"}, headers=key) as answer:
            assert answer.status == 200
        for stream in (False, True):
            body = {"model": "m", "stream": stream}
            async with pod.http.post("/v1/completions", json=body, headers={**key, "Origin": origin}) as answer:
                assert answer.status == 200
                assert answer.headers["Access-Control-Allow-Origin"] == origin
        assert "Origin" not in pod.runtime.headers[-1]
