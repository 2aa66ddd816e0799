"""Azure's storage asked in a machine's own name: the identity's endpoint gives a token, and the store takes it, over TLS as it must be."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.config.schema import RuntimeConfig
from runtime.errors import InvalidRequest, LoadFailed
from runtime.puller.progress import PullJob
from runtime.puller.source import Source
from runtime.puller.sources.azure import credential_of
from runtime.puller.sources.resolve import locate
from runtime.types import ModelSource
from tests.support.object_stores import ObjectStores
from tests.support.sources import OPEN
from tests.support.tls import make_identity

IDENTITY = (
    "AZURE_CLIENT_ID",
    "AZURE_CLIENT_SECRET",
    "AZURE_TENANT_ID",
    "AZURE_FEDERATED_TOKEN_FILE",
    "IDENTITY_ENDPOINT",
    "IDENTITY_HEADER",
    "MSI_ENDPOINT",
)


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in IDENTITY:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStores]:
    """Private, and over TLS."""
    make_identity(tmp_path)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "authority.pem"))
    stores = ObjectStores(tmp_path / "identity.pem")
    stores.private = True
    stores.objects = {"account/models/m/model.safetensors": b"abc", "account/models/m/config.json": b"{}"}
    yield stores
    stores.close()


def source_of(stores: ObjectStores, folder: Path, **options: str) -> Source:
    (folder / "default_azure").write_text(json.dumps({"endpoint_url": f"{stores.url}/account"}))
    place = locate(
        ModelSource("az://account/models/m", None, options),
        RuntimeConfig(source_hosts=("*",), storage_config_dir=str(folder)),
    )
    assert not isinstance(place, Path)
    return place


@pytest.mark.parametrize("options", [{}, {"managed_identity": "true"}, {"client_id": "one-of-several"}])
def test_azure_opens_a_private_container_with_the_machines_identity(
    stores: ObjectStores, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: dict[str, str]
) -> None:
    monkeypatch.setenv("IDENTITY_ENDPOINT", f"{stores.url}/identity")
    monkeypatch.setenv("IDENTITY_HEADER", "of-this-machine")
    source = source_of(stores, tmp_path, **options)
    job = PullJob(lambda progress: None)
    listing = source.listing(job)
    assert sorted(file.name for file in listing.files) == ["config.json", "model.safetensors"]
    for file in listing.files:
        source.fetch(file, tmp_path / file.name, job, lambda count: None)
    assert (tmp_path / "model.safetensors").read_bytes() == b"abc"
    assert sum(path == "/identity" for _, path, _ in stores.log) == 1


def test_azure_keeps_the_machines_identity_from_registered_endpoints(
    stores: ObjectStores, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("IDENTITY_ENDPOINT", f"{stores.url}/identity")
    monkeypatch.setenv("IDENTITY_HEADER", "of-this-machine")
    (tmp_path / "mine").write_text(json.dumps({"type": "azure", "account_name": "account", "container": "models"}))
    config = RuntimeConfig(source_hosts=("*",), storage_config_dir=str(tmp_path))
    elsewhere = {"endpoint_url": f"{stores.url}/account", "managed_identity": "true", "anonymous": "false"}
    for source in (ModelSource("az://account/models/m", None, elsewhere), ModelSource("m", "mine", elsewhere)):
        place = locate(source, config)
        assert not isinstance(place, Path)
        with pytest.raises(LoadFailed, match="failed to authenticate"):
            place.listing(PullJob(lambda progress: None))
    assert all(path != "/identity" for _, path, _ in stores.log)


@pytest.mark.parametrize("account", ["elsewhere.example?", "elsewhere.example#", "u@elsewhere.example", "a.b"])
def test_azure_refuses_an_account_name_that_is_a_host(account: str) -> None:
    with pytest.raises(InvalidRequest, match="letters, digits and hyphens"):
        locate(ModelSource(f"az://{account}/models/m", None, {"sas_token": "s"}), OPEN)


def test_azure_reads_a_public_container_anonymously(stores: ObjectStores, tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match="failed to authenticate"):
        source_of(stores, tmp_path).listing(PullJob(lambda progress: None))
    assert all(path != "/identity" for _, path, _ in stores.log)
    stores.private = False
    assert source_of(stores, tmp_path).listing(PullJob(lambda progress: None)).files


def test_azure_credential_of_a_service_principal() -> None:
    from azure.identity import ClientSecretCredential

    options = {"tenant_id": "t", "client_id": "c", "client_secret": "s"}
    assert isinstance(credential_of("account", options), ClientSecretCredential)
