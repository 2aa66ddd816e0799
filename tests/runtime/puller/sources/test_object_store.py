"""Google Cloud Storage and Azure Blob Storage as their own libraries speak them, against a server that imitates the services."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.cloud.storage.retry import DEFAULT_RETRY

from common.model_key import ModelSettings
from runtime.errors import LoadFailed
from runtime.puller.cache import Cache
from runtime.puller.preparer import CheckpointPreparer
from runtime.types import ModelSource
from tests.support.llama_checkpoints import tiny_llama
from tests.support.object_stores import ACCOUNT_KEY, ObjectStores
from tests.support.sources import OPEN

KINDS = ("gs", "az")


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[ObjectStores]:
    """With the same model in a bucket of each kind, and more than a page of others beside it."""
    stores = ObjectStores()
    tiny_llama(tmp_path / "m", shard="100KB")
    for bucket in ("models", "account/models"):
        for file in (tmp_path / "m").iterdir():
            stores.objects[f"{bucket}/org/tiny/{file.name}"] = file.read_bytes()
        for number in range(5):
            stores.objects[f"{bucket}/org/tiny-{number}/model.safetensors"] = b"another's"
    yield stores
    stores.close()


@pytest.fixture
def preparation(tmp_path: Path) -> Iterator[CheckpointPreparer]:
    preparation = CheckpointPreparer(OPEN, Cache(tmp_path / "cache", 1 << 30))
    yield preparation
    preparation.close()


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No credentials of this machine's, and no question of a cloud's metadata server."""
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.puller.sources.azure._RETRIES", 1)
    monkeypatch.setattr("azure.core.pipeline.transport.HttpTransport.sleep", lambda transport, seconds: None)
    monkeypatch.setattr("google.cloud.storage.retry.DEFAULT_RETRY", DEFAULT_RETRY.with_delay(initial=0.02, maximum=0.1))
    monkeypatch.setattr("runtime.puller.sources.gcs._PATIENCE_S", 1.5)
    monkeypatch.setattr("runtime.puller.progress.PullJob.wait", lambda job, seconds: job.check())


def place(kind: str, path: str, stores: ObjectStores, **options: str) -> ModelSource:
    if kind == "gs":
        return ModelSource(f"gs://{path}", None, {"endpoint_url": stores.url, **options})
    return ModelSource(f"az://account/{path}", None, {"endpoint_url": f"{stores.url}/account", **options})


async def pull(preparation: CheckpointPreparer, source: ModelSource, tmp_path: Path) -> None:
    """And see that all of it came, byte for byte."""
    prepared = await preparation.prepare(source, ModelSettings(), "cpu", lambda progress: None)
    names = [Path(name) for name in prepared.checkpoint.weight_files]
    assert len(names) > 1
    assert all(name.read_bytes() == (tmp_path / "m" / name.name).read_bytes() for name in names)
    prepared.release()


@pytest.mark.parametrize("kind", KINDS)
async def test_object_store_loads_from_a_public_bucket(
    kind: str, stores: ObjectStores, preparation: CheckpointPreparer, tmp_path: Path
) -> None:
    source = place(kind, "models/org/tiny", stores)
    look = await preparation.look(source, ModelSettings(), "cpu")
    assert look.exact
    assert sum(len(asked) for asked in stores.reads) < 1000  # headers, no weights
    await pull(preparation, source, tmp_path)
    assert all(path.partition("/b/")[2] != "models" for _, path, _ in stores.log), (
        "a reader of objects may have no right to ask for the bucket"
    )
    # what is here is used when the store is away
    stores.log.clear()
    await pull(preparation, source, tmp_path)
    assert stores.reads == []


@pytest.mark.parametrize("kind", KINDS)
async def test_object_store_resumes_an_interrupted_pull(
    kind: str, stores: ObjectStores, preparation: CheckpointPreparer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.puller.sources.object_store._CHUNK_BYTES", 20_000)
    stores.cuts = 2
    await pull(preparation, place(kind, "models/org/tiny", stores), tmp_path)
    assert stores.cuts == 0
    firsts = [int(asked.removeprefix("bytes=").partition("-")[0]) for asked in stores.reads]
    total = sum(len(data) for name, data in stores.objects.items() if name.startswith("models/org/tiny/"))
    assert len(firsts) <= total // 20_000 + 14  # a piece at a time, and few of them twice


@pytest.mark.parametrize("kind", KINDS)
async def test_object_store_resumes_an_abandoned_pull(
    kind: str, stores: ObjectStores, preparation: CheckpointPreparer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.puller.sources.object_store._CHUNK_BYTES", 20_000)
    monkeypatch.setattr("runtime.puller.sources.object_store._TRIES", 1)
    monkeypatch.setattr("runtime.puller.download._FILES_AT_ONCE", 1)
    source = place(kind, "models/org/tiny", stores)
    reads = 0

    def breaks() -> None:
        nonlocal reads
        reads += 1
        if reads > 6:
            raise ConnectionAbortedError

    stores.before_read = breaks
    with pytest.raises(LoadFailed, match="cannot be read"):
        await preparation.prepare(source, ModelSettings(), "cpu", lambda progress: None)
    stores.before_read = lambda: None
    stores.log.clear()
    await pull(preparation, source, tmp_path)
    assert "bytes=0-19999" not in stores.reads[:1]  # the first file is not begun anew


@pytest.mark.parametrize(("kind", "by"), [("gs", "md5"), ("gs", "crc32c"), ("az", "md5")])
async def test_object_store_refuses_corrupt_bytes(
    kind: str, by: str, stores: ObjectStores, preparation: CheckpointPreparer
) -> None:
    stores.no_md5 = by == "crc32c"
    stores.corrupt = "org/tiny/tokenizer.json"
    with pytest.raises(LoadFailed, match=rf"tokenizer.json is corrupt: its {by} is \w+, the source gives \w+"):
        await preparation.prepare(place(kind, "models/org/tiny", stores), ModelSettings(), "cpu", lambda progress: None)


@pytest.mark.parametrize("kind", KINDS)
async def test_object_store_never_mixes_two_versions_of_an_object(
    kind: str, stores: ObjectStores, preparation: CheckpointPreparer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores.no_md5 = True

    def replace() -> None:
        for name in stores.objects:
            if name.endswith("tiny/tokenizer.json"):
                stores.objects[name] += b" "

    stores.before_read = replace
    with pytest.raises(LoadFailed, match=r"tokenizer\.json (cannot be read|is not valid JSON)"):
        await preparation.prepare(place(kind, "models/org/tiny", stores), ModelSettings(), "cpu", lambda progress: None)


@pytest.mark.parametrize("kind", KINDS)
async def test_object_store_names_what_is_missing(
    kind: str, stores: ObjectStores, preparation: CheckpointPreparer
) -> None:
    for path, text in (("absent/org/tiny", "does not exist"), ("models/org/absent", "nothing is there")):
        with pytest.raises(LoadFailed, match=text) as caught:
            await preparation.prepare(place(kind, path, stores), ModelSettings(), "cpu", lambda progress: None)
        assert path in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
async def test_object_store_retries_a_busy_store(
    kind: str, stores: ObjectStores, preparation: CheckpointPreparer, tmp_path: Path
) -> None:
    stores.refusals = 1
    await pull(preparation, place(kind, "models/org/tiny", stores), tmp_path)


async def test_gcs_requires_credentials(stores: ObjectStores, preparation: CheckpointPreparer, tmp_path: Path) -> None:
    stores.private = True
    with pytest.raises(LoadFailed, match="it is not public, and there are no credentials for it"):
        await preparation.prepare(place("gs", "models/org/tiny", stores), ModelSettings(), "cpu", lambda progress: None)
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    account = {
        "client_email": "reader@models.iam.gserviceaccount.com",
        "private_key": pem,
        "token_uri": f"{stores.url}/token",
        "project_id": "p",
    }
    await pull(preparation, place("gs", "models/org/tiny", stores, **account), tmp_path)
    with pytest.raises(LoadFailed, match="gs://absent") as caught:
        await preparation.prepare(
            place("gs", "absent/m", stores, **account), ModelSettings(), "cpu", lambda progress: None
        )
    assert "PRIVATE" not in str(caught.value)


async def test_azure_requires_credentials(
    stores: ObjectStores, preparation: CheckpointPreparer, tmp_path: Path
) -> None:
    stores.private = True
    wrong = {"account_key": "d3Jvbmc="}
    for options in ({}, wrong, {"sas_token": "sv=1&sig=wrong"}):
        with pytest.raises(
            LoadFailed, match=r"ClientAuthenticationError: Server failed to authenticate the request\."
        ) as caught:
            await preparation.prepare(
                place("az", "models/org/tiny", stores, **options), ModelSettings(), "cpu", lambda progress: None
            )
        assert not {"wrong", "d3Jvbmc="} & set(str(caught.value).replace("=", " ").split())
    await pull(preparation, place("az", "models/org/tiny", stores, account_key=ACCOUNT_KEY), tmp_path)
    stores.log.clear()
    fresh = CheckpointPreparer(OPEN, Cache(tmp_path / "other", 1 << 30))
    await pull(
        fresh, place("az", "models/org/tiny", stores, sas_token="sv=2024-01-01&sp=rl&sig=a%2Bsignature%3D"), tmp_path
    )
    fresh.close()
    assert stores.reads
    connection = (
        f"DefaultEndpointsProtocol=http;AccountName=account;AccountKey={ACCOUNT_KEY};BlobEndpoint={stores.url}/account"
    )
    look = await preparation.look(
        place("az", "models/org/tiny", stores, connection_string=connection), ModelSettings(), "cpu"
    )
    assert look.exact


@pytest.mark.parametrize("kind", KINDS)
async def test_object_store_keeps_pulled_models_while_it_is_unreachable(
    kind: str, stores: ObjectStores, preparation: CheckpointPreparer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"sas_token": "sv=1&sig=SECRET"} if kind == "az" else {}
    source = place(kind, "models/org/tiny", stores, **options)
    await pull(preparation, source, tmp_path)
    stores.close()
    await pull(preparation, source, tmp_path)
    with pytest.raises(LoadFailed, match="cannot be listed") as caught:
        await preparation.prepare(
            place(kind, "models/org/other", stores, **options), ModelSettings(), "cpu", lambda progress: None
        )
    assert "SECRET" not in str(caught.value)
