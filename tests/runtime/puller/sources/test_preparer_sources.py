"""A checkpoint prepared from a source: pulled once, pulled again when it changes, and inspected without a pull."""

import os
from pathlib import Path

import pytest

from common.model_key import ModelSettings, Quantization
from runtime.errors import LoadFailed
from runtime.models.model_state import Phase, Progress
from runtime.puller.cache import Cache
from runtime.puller.preparer import CheckpointPreparer
from runtime.types import ModelSource
from tests.support.llama_checkpoints import tiny_llama
from tests.support.smollm2 import gguf_path
from tests.support.sources import OPEN
from tests.support.web import WebServer


async def test_web_source_pulls_once_and_resumes(web: WebServer, tmp_path: Path) -> None:
    tiny_llama(web.root / "org" / "tiny", shard="100KB")
    web.cuts, web.cut_after, web.refusals = 2, 50_000, 1
    preparation = CheckpointPreparer(OPEN, Cache(tmp_path / "cache", 1 << 30))
    seen: list[Progress] = []
    source = ModelSource(f"{web.url}/org/tiny")
    prepared = await preparation.prepare(source, ModelSettings(), "cpu", seen.append)
    files = {Path(name).name: Path(name) for name in prepared.checkpoint.weight_files}
    assert len(files) > 1
    for name, path in files.items():
        assert path.read_bytes() == (web.root / "org" / "tiny" / name).read_bytes()
    assert any(asked == "bytes=50000-" for _, _, asked in web.log)
    pulling = [progress for progress in seen if progress.phase is Phase.PULLING]
    assert pulling[-1].done_bytes == pulling[-1].total_bytes > 0
    web.log.clear()
    again = await preparation.prepare(source, ModelSettings(), "cpu", seen.append)
    assert {method for method, path, _ in web.log if path.endswith(".safetensors")} == {"HEAD"}
    look = await preparation.look(source, ModelSettings(), "cpu")
    assert look.exact
    assert look.needs.weight_bytes == prepared.checkpoint.weight_bytes
    prepared.release()
    again.release()
    preparation.close()


async def test_look_says_what_the_blocks_of_a_gguf_file_take(web: WebServer, tmp_path: Path) -> None:
    """From the file here, and from a web server before anything is pulled, in one small read."""
    preparation = CheckpointPreparer(OPEN, Cache(tmp_path / "cache", 1 << 30))
    local = await preparation.look(ModelSource(str(gguf_path())), ModelSettings(), "cpu")
    assert local.unpacking is not None
    assert local.unpacking.blocks == "Q4_1"
    assert local.unpacking.stored_bytes == pytest.approx(gguf_path().stat().st_size, rel=0.05)
    assert local.unpacking.stored_bytes < local.unpacking.nf4_weight_bytes < local.needs.weight_bytes
    (web.root / "smol.gguf").symlink_to(gguf_path())
    remote = await preparation.look(ModelSource(f"{web.url}/smol.gguf"), ModelSettings(), "cpu")
    assert (remote.needs, remote.unpacking, remote.is_remote_gguf) == (local.needs, local.unpacking, True)
    assert await preparation.refusal(remote, ModelSettings()) == ""
    assert {asked for method, _, asked in web.log if method == "GET"} == {"bytes=0-4194303"}
    quantised = await preparation.look(ModelSource(str(gguf_path())), ModelSettings(quantize=Quantization.NF4), "cpu")
    assert quantised.unpacking is not None
    assert quantised.unpacking.nf4_weight_bytes == 0
    assert quantised.needs.weight_bytes == local.unpacking.nf4_weight_bytes
    preparation.close()


async def test_preparer_pulls_a_changed_file_again(web: WebServer, tmp_path: Path) -> None:
    tiny_llama(web.root / "m")
    preparation = CheckpointPreparer(OPEN, Cache(tmp_path / "cache", 1 << 30))
    first = await preparation.prepare(ModelSource(f"{web.url}/m"), ModelSettings(), "cpu", lambda progress: None)
    tiny_llama(web.root / "m", seed=1)
    second = await preparation.prepare(ModelSource(f"{web.url}/m"), ModelSettings(), "cpu", lambda progress: None)
    assert first.checkpoint.model_dir != second.checkpoint.model_dir
    preparation.close()


async def test_preparer_keeps_pulled_models_of_an_unreachable_source(tmp_path: Path) -> None:
    (tmp_path / "www").mkdir()
    web = WebServer(tmp_path / "www")
    tiny_llama(web.root / "m")
    preparation = CheckpointPreparer(OPEN, Cache(tmp_path / "cache", 1 << 30))
    first = await preparation.prepare(ModelSource(f"{web.url}/m"), ModelSettings(), "cpu", lambda progress: None)
    first.release()
    web.close()
    again = await preparation.prepare(ModelSource(f"{web.url}/m"), ModelSettings(), "cpu", lambda progress: None)
    assert again.checkpoint == first.checkpoint
    with pytest.raises(LoadFailed, match="cannot be reached"):
        await preparation.prepare(ModelSource(f"{web.url}/other"), ModelSettings(), "cpu", lambda progress: None)
    preparation.close()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
async def test_preparer_identity_changes_with_the_files(tmp_path: Path, name: str) -> None:
    tiny_llama(tmp_path / "m")
    preparer = CheckpointPreparer(OPEN, Cache(tmp_path / "cache", 1 << 30))
    source = ModelSource(str(tmp_path / "m"))
    prepared = await preparer.prepare(source, ModelSettings(), "cpu", lambda progress: None)
    assert await preparer.identity(source) == prepared.identity
    os.utime(tmp_path / "m" / name, ns=(1, 1))
    assert await preparer.identity(source) != prepared.identity
    prepared.release()
    preparer.close()


async def test_preparer_identity_changes_with_the_etag(web: WebServer, tmp_path: Path) -> None:
    tiny_llama(web.root / "m")
    preparer = CheckpointPreparer(OPEN, Cache(tmp_path / "cache", 1 << 30))
    source = ModelSource(f"{web.url}/m")
    prepared = await preparer.prepare(source, ModelSettings(), "cpu", lambda progress: None)
    assert await preparer.identity(source) == prepared.identity
    tiny_llama(web.root / "m", seed=1)
    assert await preparer.identity(source) != prepared.identity
    prepared.release()
    preparer.close()
