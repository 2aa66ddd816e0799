"""Sources that do not answer: what was listed of a place before still holds for that place, and for no other."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.model_key import ModelSettings
from runtime.errors import LoadFailed
from runtime.puller.cache import Cache
from runtime.puller.preparer import CheckpointPreparer
from runtime.puller.progress import PullJob
from runtime.puller.source import Unreachable
from runtime.puller.sources.huggingface import HubSource
from runtime.types import ModelSource
from tests.support.llama_checkpoints import tiny_llama
from tests.support.sources import ANYWHERE, OPEN
from tests.support.web import WebServer

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def preparation(tmp_path: Path) -> Iterator[CheckpointPreparer]:
    preparation = CheckpointPreparer(OPEN, Cache(tmp_path / "cache", 1 << 30))
    yield preparation
    preparation.close()


async def model_dir(preparation: CheckpointPreparer, source: ModelSource) -> Path:
    prepared = await preparation.prepare(source, ModelSettings(), "cpu", lambda progress: None)
    prepared.release()
    return Path(prepared.checkpoint.model_dir)


async def test_preparer_separates_one_path_in_two_buckets(preparation: CheckpointPreparer, tmp_path: Path) -> None:
    (tmp_path / "www").mkdir()
    web = WebServer(tmp_path / "www")
    places = [ModelSource("m", None, {"type": "http", "url": f"{web.url}/{name}"}) for name in ("one", "two")]
    for seed, name in enumerate(("one", "two")):
        tiny_llama(web.root / name / "m", seed=seed)
    one, two = [await model_dir(preparation, place) for place in places]
    web.close()
    assert await model_dir(preparation, places[0]) == one
    assert await model_dir(preparation, places[1]) == two
    assert one != two


def hub(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{web.url}/")  # as people write it
    monkeypatch.setenv("HF_TOKEN", "")
    files = sorted((web.root / "m").iterdir())
    info = {
        "id": "org/m", "sha": SHA, "siblings": [{"rfilename": file.name, "size": file.stat().st_size, "blobId": file.name} for file in files]
    }  # fmt: skip
    web.routes["/api/models/org/m/revision/main"] = lambda: (
        200,
        {"Content-Type": "application/json"},
        json.dumps(info).encode(),
    )
    for file in files:
        web.routes[f"/org/m/resolve/{SHA}/{file.name}"] = lambda file=file: (200, {}, file.read_bytes())  # type: ignore[misc]


async def test_preparer_keeps_pulled_models_of_a_failing_hub(
    web: WebServer, preparation: CheckpointPreparer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llama(web.root / "m")
    hub(web, monkeypatch)
    source = ModelSource("hf://org/m")
    pulled = await model_dir(preparation, source)
    web.routes["/api/models/org/m/revision/main"] = lambda: (503, {}, b"")
    assert await model_dir(preparation, source) == pulled
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert await model_dir(preparation, source) == pulled
    with pytest.raises(LoadFailed, match="OfflineModeIsEnabled"):
        await model_dir(preparation, ModelSource("hf://org/other"))


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [(403, "GatedRepo", "private or gated"), (401, "", "refuses access"), (400, "", "cannot be used")],
)
def test_hub_source_refusal_is_not_unreachable(
    web: WebServer, monkeypatch: pytest.MonkeyPatch, status: int, code: str, words: str
) -> None:
    (web.root / "m").mkdir()
    hub(web, monkeypatch)
    web.routes["/api/models/org/m/revision/main"] = lambda: (status, {"X-Error-Code": code} if code else {}, b"{}")
    with pytest.raises(LoadFailed, match=words) as caught:
        HubSource("org/m", "hf_HIDDEN", allow_pickle=False, destinations=ANYWHERE).listing(
            PullJob(lambda progress: None)
        )
    assert not isinstance(caught.value, Unreachable)
    assert "HIDDEN" not in str(caught.value)
