"""A TLS identity follows its files, and keeps what it had while they do not fit together."""

import asyncio
import shutil
from pathlib import Path

import pytest

from common.errors import ConfigError
from mesh.access.tls import TlsIdentity
from tests.support.tls import Authority
from tests.support.waiting import until


async def test_tls_identity_follows_its_files_and_skips_halves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    authority = Authority("ca")
    certificate, key = authority.issue(tmp_path / "now")
    identity = TlsIdentity(certificate, key, str(authority.write(tmp_path / "ca.pem")), poll_s=0.01)
    identity.server_context()
    before = identity.material
    following = asyncio.create_task(identity.run())
    try:
        fresh_certificate, fresh_key = authority.issue(tmp_path / "fresh")
        shutil.copy(fresh_certificate, certificate)
        await until(lambda: "the certificate stays as it was" in caplog.text)
        assert identity.material == before, "the key is still the old one"
        shutil.copy(fresh_key, key)
        await until(lambda: identity.generation == 1)
        assert identity.material.certificate == Path(fresh_certificate).read_bytes()
    finally:
        following.cancel()


def test_tls_identity_names_what_cannot_be_used(tmp_path: Path) -> None:
    certificate, key = Authority("ca").issue(tmp_path)
    other = Authority("ca").issue(tmp_path / "other")[1]
    (tmp_path / "bad").write_text("no PEM")
    for files, named in (
        ((certificate, str(tmp_path / "none")), "No such file"),
        ((certificate, other), "cannot be used together"),
        ((str(tmp_path / "bad"), key), "cannot be used together"),
        ((certificate, key, str(tmp_path / "bad")), "cannot be used together"),
    ):
        with pytest.raises(ConfigError, match=named):
            TlsIdentity(*files)
