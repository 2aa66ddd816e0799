"""Where models come from: web servers that cut and change, the hub's protocol, storage configurations, buckets, paths and their bounds."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from common.model_key import ModelSettings, Quantization
from runtime.config.schema import RuntimeConfig
from runtime.errors import Cancelled, InvalidRequest, LoadFailed
from runtime.models.model_state import Phase, Progress
from runtime.puller.cache import Cache
from runtime.puller.preparer import CheckpointPreparer
from runtime.puller.source import RemoteFile, wanted
from runtime.puller.sources.http_client import HttpClient
from runtime.puller.sources.http_source import WebSource
from runtime.puller.sources.huggingface import HubSource
from runtime.puller.sources.object_store import BucketSource
from runtime.puller.sources.resolve import locate
from runtime.puller.sources.storage_config import storage_options
from runtime.types import ModelSource
from tests.support.llama_checkpoints import tiny_llama
from tests.support.smollm2 import gguf_path
from tests.support.sources import ANYWHERE, OPEN, job, source_of
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


def test_fetch_resumes_only_the_same_file(web: WebServer, tmp_path: Path) -> None:
    (web.root / "f").write_bytes(bytes(range(256)) * 100)
    client = HttpClient(destinations=ANYWHERE)
    file = client.look("f", f"{web.url}/f", job())
    assert file is not None
    target = tmp_path / "f"
    target.with_name("f.part").write_bytes((web.root / "f").read_bytes()[:1000])
    target.with_name("f.tag").write_text("of another file")
    arrived: list[int] = []
    client.fetch(file, target, job(), arrived.append)
    assert target.read_bytes() == (web.root / "f").read_bytes()
    assert sum(arrived) == 25600
    assert not target.with_name("f.tag").exists()


def test_fetch_never_resumes_unidentified_content(web: WebServer, tmp_path: Path) -> None:
    (web.root / "f").write_bytes(b"new" * 1000)
    file = RemoteFile("f", f"{web.url}/f", 3000)  # as of a server without ETag and date
    (tmp_path / "f.part").write_bytes(b"old" * 500)
    (tmp_path / "f.tag").write_text("3000 ")
    HttpClient(destinations=ANYWHERE).fetch(file, tmp_path / "f", job(), lambda count: None)
    assert (tmp_path / "f").read_bytes() == b"new" * 1000


def test_fetch_starts_over_without_ranges(web: WebServer, tmp_path: Path) -> None:
    (web.root / "f").write_bytes(b"x" * 10_000)
    web.ranges, web.cuts, web.cut_after = False, 1, 4000
    file = HttpClient(destinations=ANYWHERE).look("f", f"{web.url}/f", job())
    assert file is not None
    arrived: list[int] = []
    HttpClient(destinations=ANYWHERE).fetch(file, tmp_path / "f", job(), arrived.append)
    assert (tmp_path / "f").stat().st_size == sum(arrived) == 10_000


def test_fetch_deletes_a_file_with_a_wrong_checksum(web: WebServer, tmp_path: Path) -> None:
    (web.root / "f").write_bytes(b"data")
    file = HttpClient(destinations=ANYWHERE).look("f", f"{web.url}/f", job())
    assert file is not None
    with pytest.raises(LoadFailed, match="f is corrupt: its sha256"):
        HttpClient(destinations=ANYWHERE).fetch(
            replace(file, sha256="0" * 64), tmp_path / "f", job(), lambda count: None
        )
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("f") and path.suffix != ".tag"]


def test_fetch_survives_many_interruptions(web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.puller.progress.PullJob.wait", lambda job, seconds: job.check())
    (web.root / "f").write_bytes(bytes(200_000))
    web.cuts, web.cut_after = 15, 10_000
    file = HttpClient(destinations=ANYWHERE).look("f", f"{web.url}/f", job())
    assert file is not None
    HttpClient(destinations=ANYWHERE).fetch(file, tmp_path / "f", job(), lambda count: None)
    assert (tmp_path / "f").stat().st_size == 200_000
    assert web.cuts == 0


def test_fetch_stops_at_the_listed_size(web: WebServer, tmp_path: Path) -> None:
    (web.root / "f").write_bytes(bytes(20 << 20))
    arrived: list[int] = []
    with pytest.raises(LoadFailed, match="the source lists 4"):
        HttpClient(destinations=ANYWHERE).fetch(
            RemoteFile("f", f"{web.url}/f", 4, '"tag"'), tmp_path / "f", job(), arrived.append
        )
    assert sum(arrived) < 4 << 20
    assert not (tmp_path / "f.part").exists()


def test_fetch_ignores_an_invalid_content_length(web: WebServer, tmp_path: Path) -> None:
    web.routes["/f"] = lambda: (200, {"Content-Length": "much"}, b"data")
    HttpClient(destinations=ANYWHERE).fetch(
        RemoteFile("f", f"{web.url}/f", 4), tmp_path / "f", job(), lambda count: None
    )
    assert (tmp_path / "f").read_bytes() == b"data"


def test_web_source_errors_hold_no_secrets(web: WebServer) -> None:
    with pytest.raises(LoadFailed, match=r"no config\.json"):
        source_of(f"{web.url}/nothing?sig=SECRET").listing(job())
    web.secret = "Bearer right"
    with pytest.raises(LoadFailed, match="401") as caught:
        WebSource(
            f"{web.url}/m?sig=SECRET", HttpClient({"Authorization": "Bearer WRONG"}, destinations=ANYWHERE)
        ).listing(job())
    assert "SECRET" not in str(caught.value)
    assert "WRONG" not in str(caught.value)
    with pytest.raises(LoadFailed, match="cannot be reached"):
        source_of("http://127.0.0.1:1/m").listing(job())


def test_fetch_drops_the_token_on_a_redirect(web: WebServer, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = WebServer(tmp_path / "other")
    try:
        (other.root / "f").write_bytes(b"data")
        web.routes["/f"] = lambda: (302, {"Location": f"{other.url}/f"}, b"")
        web.secret = "Bearer T"
        HttpClient({"Authorization": "Bearer T"}, destinations=ANYWHERE).fetch(
            RemoteFile("f", f"{web.url}/f", 4), tmp_path / "f", job(), lambda count: None
        )
        assert (tmp_path / "f").read_bytes() == b"data"
        assert web.authorizations == ["Bearer T"]
        assert other.authorizations == [""]
    finally:
        other.close()


def test_fetch_can_be_cancelled(web: WebServer, tmp_path: Path) -> None:
    (web.root / "f").write_bytes(bytes(10 << 20))
    file = HttpClient(destinations=ANYWHERE).look("f", f"{web.url}/f", job())
    assert file is not None
    work = job()
    with pytest.raises(Cancelled):
        HttpClient(destinations=ANYWHERE).fetch(file, tmp_path / "f", work, lambda count: work.cancel())
    assert not (tmp_path / "f").exists()


def test_hub_source_lists_and_fetches(web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", web.url)
    data = b"weights"
    sha = "0123456789abcdef0123456789abcdef01234567"
    info = {
        "id": "org/m",
        "modelId": "org/m",
        "sha": sha,
        "private": False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "siblings": [
            {
                "rfilename": "model.safetensors",
                "size": 7,
                "blobId": "b1",
                "lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": 7, "pointerSize": 100},
            },
            {"rfilename": "config.json", "size": 2, "blobId": "b2"},
            {"rfilename": "pytorch_model.bin", "size": 9, "blobId": "b3"},
            {"rfilename": "onnx/model.onnx", "size": 9, "blobId": "b4"},
        ],
    }
    web.routes["/api/models/org/m/revision/v1"] = lambda: (
        200,
        {"Content-Type": "application/json"},
        json.dumps(info).encode(),
    )
    web.routes[f"/org/m/resolve/{sha}/model.safetensors"] = lambda: (200, {}, data)
    web.secret = "Bearer hub-token"
    source = HubSource("org/m:v1", "hub-token", allow_pickle=False, destinations=ANYWHERE)
    listing = source.listing(job())
    assert listing.origin == f"hf://org/m@{sha}"
    assert [file.name for file in listing.files] == ["model.safetensors", "config.json"]
    source.fetch(listing.files[0], tmp_path / "w", job(), lambda count: None)
    assert (tmp_path / "w").read_bytes() == data
    with pytest.raises(LoadFailed, match=r"no such repository|cannot be used|cannot be reached"):
        HubSource("org/absent", "hub-token", allow_pickle=False, destinations=ANYWHERE).listing(job())
    for bad in ("onlyname", "a/b/c/d", "a/", "a/b:"):
        with pytest.raises(InvalidRequest):
            HubSource(bad, None, allow_pickle=False, destinations=ANYWHERE)


class DictBucket:
    """An object store in memory; `fail` reads fail first."""

    origin = "s3://bucket"
    away: tuple[type[Exception], ...] = (TimeoutError,)

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects
        self.fail = 0

    def list(self, prefix: str) -> Iterator[RemoteFile]:
        for key, data in self.objects.items():
            if key.startswith(prefix):
                yield RemoteFile(key, key, len(data), "tag", md5=hashlib.md5(data).hexdigest())

    def checkable(self, file: RemoteFile) -> RemoteFile:
        return file

    def read(self, file: RemoteFile, start: int, count: int) -> bytes:
        if self.fail:
            self.fail -= 1
            raise ConnectionResetError("reset")
        return self.objects[file.location][start : start + count]


def test_bucket_source_lists_below_its_prefix(tmp_path: Path) -> None:
    objects = {
        "m/model.safetensors": b"abc",
        "m/config.json": b"{}",
        "m/sub/": b"",
        "m2/config.json": b"{}",
        "m/x/../../evil": b"x",
    }
    bucket = DictBucket({key: data for key, data in objects.items() if "evil" not in key})
    source = BucketSource(bucket, "m", allow_pickle=False)
    listing = source.listing(job())
    assert sorted(file.name for file in listing.files) == ["config.json", "model.safetensors"]
    bucket.fail = 1
    weights = next(file for file in listing.files if file.name == "model.safetensors")
    source.fetch(weights, tmp_path / "w", job(), lambda count: None)
    assert (tmp_path / "w").read_bytes() == b"abc"
    bucket.objects["m/model.safetensors"] = b"xyz"
    with pytest.raises(LoadFailed, match="corrupt"):
        source.fetch(weights, tmp_path / "v", job(), lambda count: None)
    with pytest.raises(LoadFailed, match="outside the model's directory"):
        BucketSource(DictBucket(objects), "m", allow_pickle=False).listing(job())
    with pytest.raises(LoadFailed, match="nothing is there"):
        BucketSource(bucket, "absent", allow_pickle=False).listing(job())


def test_wanted_selects_one_kind_of_weights() -> None:
    def names(*given: str, allow_pickle: bool = False) -> list[str]:
        return [
            file.name for file in wanted([RemoteFile(name, name, 1) for name in given], "o", allow_pickle=allow_pickle)
        ]

    assert names("model.safetensors", "pytorch_model.bin", "config.json", "m.gguf", "tf.h5") == [
        "model.safetensors",
        "config.json",
    ]
    modules = ["2_Dense/model.safetensors", "1_Pooling/config.json", "2_Dense/config.json"]
    assert names(
        "model.safetensors", *modules, "2_Dense/pytorch_model.bin", "1_epoch/config.json", "x/1_Pooling/config.json"
    ) == [
        "model.safetensors",
        *modules,
    ]
    assert names("a.gguf", "README.md") == ["a.gguf"]
    with pytest.raises(LoadFailed, match="2 GGUF files"):
        names("a.gguf", "b.gguf")
    with pytest.raises(LoadFailed, match="pickled"):
        names("pytorch_model.bin", "config.json")
    assert names("pytorch_model.bin", "config.json", allow_pickle=True) == ["pytorch_model.bin", "config.json"]
    with pytest.raises(LoadFailed, match="no weights"):
        names("config.json")


def test_storage_options_overlay_the_configuration(tmp_path: Path, web: WebServer) -> None:
    (tmp_path / "mine").write_text(
        json.dumps({"type": "http", "url": f"{web.url}/base/", "headers": {"Authorization": "Bearer K"}})
    )
    config = RuntimeConfig(source_hosts=("*",), storage_config_dir=str(tmp_path), pvc_dir=str(tmp_path / "pvc"))
    tiny_llama(web.root / "base" / "m")
    web.secret = "Bearer K"
    listing = source_of("m", config, storage_key="mine").listing(job())
    assert {file.name for file in listing.files} >= {"config.json", "model.safetensors", "tokenizer.json"}
    options = storage_options(str(tmp_path), "mine", {"bucket": "b"}, destinations=ANYWHERE)
    assert options.values["bucket"] == "b"
    assert options.trusted_hosts == {"127.0.0.1"}
    with pytest.raises(LoadFailed, match="Did not find storage config for key other"):
        locate(ModelSource("m", "other"), config)
    with pytest.raises(InvalidRequest, match="not a name"):
        locate(ModelSource("m", "../etc/passwd"), config)
    (tmp_path / "broken").write_text("SECRET{")
    with pytest.raises(LoadFailed, match="not a readable JSON object") as caught:
        locate(ModelSource("m", "broken"), config)
    assert "SECRET" not in str(caught.value)
    (tmp_path / "pvc" / "claim" / "m").mkdir(parents=True)
    assert locate(ModelSource("m", None, {"type": "pvc", "name": "claim"}), config) == tmp_path / "pvc" / "claim" / "m"
    assert locate(ModelSource("pvc://claim/m"), config) == tmp_path / "pvc" / "claim" / "m"
    with pytest.raises(InvalidRequest, match="outside"):
        locate(ModelSource("pvc://claim/../../secret"), config)
    with pytest.raises(InvalidRequest, match="ftp:// is not known"):
        locate(ModelSource("ftp://x/y"), config)


def test_local_path_stays_within_its_roots(tmp_path: Path) -> None:
    root, outside = tmp_path / "models", tmp_path / "outside"
    (root / "m").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret").write_text("x")
    config = RuntimeConfig(model_roots=(str(root),))
    assert locate(ModelSource(str(root / "m")), config) == root / "m"
    assert locate(ModelSource(f"file://{root}/m"), config) == root / "m"
    for path in (str(outside), f"{root}/../outside", f"{root}/m/../../outside"):
        with pytest.raises(InvalidRequest, match="outside the model roots"):
            locate(ModelSource(path), config)
    (root / "link").symlink_to(outside)
    with pytest.raises(InvalidRequest, match="outside the model roots"):
        locate(ModelSource(str(root / "link")), config)
    (root / "m" / "config.json").symlink_to(outside / "secret")
    with pytest.raises(InvalidRequest, match="links outside"):
        locate(ModelSource(str(root / "m")), config)
    with pytest.raises(InvalidRequest, match="relative"):
        locate(ModelSource("m"), config)
    with pytest.raises(LoadFailed, match="no such file"):
        locate(ModelSource(str(root / "absent")), config)


@pytest.mark.parametrize(("uri", "extra"), [("s3://b/m", "s3"), ("gs://b/m", "gcs"), ("az://a/c/m", "azure")])
def test_locate_names_the_extra_of_a_missing_library(uri: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("boto3", "google.cloud", "azure.storage.blob"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(LoadFailed, match=rf"repertory\[{extra}\]"):
        locate(ModelSource(uri), OPEN)


def test_http_client_stops_trying_again_once_it_is_cancelled(web: WebServer) -> None:
    work = job()

    def busy() -> tuple[int, dict[str, str], bytes]:
        work.cancel()
        return 503, {}, b""

    web.routes["/f"] = busy
    with pytest.raises(Cancelled):
        HttpClient(destinations=ANYWHERE).look("f", f"{web.url}/f", work)
    with pytest.raises(Cancelled):
        HttpClient(destinations=ANYWHERE).read(f"{web.url}/f", 0, 4, work)
    assert len(web.log) == 1


def test_listing_refuses_one_part_of_a_split_gguf_file(web: WebServer) -> None:
    with pytest.raises(LoadFailed, match=r"part 1 of a GGUF file that was split into 2"):
        source_of(f"{web.url}/m-00001-of-00002.gguf").listing(job())
    assert not web.log
    with pytest.raises(LoadFailed, match="part 2"):
        wanted([RemoteFile("m-00002-of-00002.gguf", "", 1)], "s3://b/m", allow_pickle=False)


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
