"""The name of a certificate that pods share."""

from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from common.errors import ConfigError
from mesh.access.certificate_name import dns_name_of
from tests.support.tls import Authority


@pytest.mark.parametrize(
    ("in_certificate", "name"),
    [("modelmesh.models.svc", "modelmesh.models.svc"), ("*.models.svc", "pod.models.svc")],
)
def test_dns_name_of_a_certificate(tmp_path: Path, in_certificate: str, name: str) -> None:
    certificate, _ = Authority("any").issue(tmp_path, in_certificate)
    assert dns_name_of(Path(certificate).read_bytes()) == name


@pytest.mark.parametrize("names", [(), (x509.RFC822Name("a@example.org"),)])
def test_dns_name_of_a_certificate_without_one(names: tuple[x509.GeneralName, ...]) -> None:
    certificate = Authority("any", *names).certificate.public_bytes(Encoding.PEM)
    with pytest.raises(ConfigError, match="set peer_tls_name"):
        dns_name_of(certificate)
