"""Where models come from: the hub's protocol, storage configurations, buckets, paths and their bounds."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.config.schema import RuntimeConfig
from runtime.errors import InvalidRequest, LoadFailed
from runtime.puller.source import RemoteFile, wanted
from runtime.puller.sources.http_client import HttpClient
from runtime.puller.sources.http_source import WebSource
from runtime.puller.sources.huggingface import HubSource
from runtime.puller.sources.object_store import BucketSource
from runtime.puller.sources.resolve import locate
from runtime.puller.sources.storage_config import storage_options
from runtime.types import ModelSource
from tests.support.llama_checkpoints import tiny_llama
from tests.support.sources import ANYWHERE, OPEN, job, source_of
from tests.support.web import WebServer


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


def test_listing_refuses_one_part_of_a_split_gguf_file(web: WebServer) -> None:
    with pytest.raises(LoadFailed, match=r"part 1 of a GGUF file that was split into 2"):
        source_of(f"{web.url}/m-00001-of-00002.gguf").listing(job())
    assert not web.log
    with pytest.raises(LoadFailed, match="part 2"):
        wanted([RemoteFile("m-00002-of-00002.gguf", "", 1)], "s3://b/m", allow_pickle=False)
