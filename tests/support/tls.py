"""Certificates for tests, made on the spot: one that signed itself, and those of an authority."""

import datetime
import ipaddress
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

_PEM = serialization.Encoding.PEM
_LOOPBACK = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))


def make_identity(folder: Path) -> None:
    """Write `identity.pem` (key and certificate of a server at 127.0.0.1) and `authority.pem` (what its clients trust)."""
    authority = Authority("127.0.0.1", _LOOPBACK)
    (folder / "identity.pem").write_bytes(_private(authority.key) + authority.certificate.public_bytes(_PEM))
    (folder / "authority.pem").write_bytes(authority.certificate.public_bytes(_PEM))


class Authority:
    """A key and a certificate that signed itself, valid for `names` and allowed to sign others."""

    def __init__(self, common_name: str, *names: x509.GeneralName) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = _certificate(common_name, names, self.key, None, None)

    def write(self, path: Path) -> Path:
        path.write_bytes(self.certificate.public_bytes(_PEM))
        return path

    def issue(self, folder: Path, dns_name: str = "repertory") -> tuple[str, str]:
        """Write `tls.crt` and `tls.key` for a DNS name and 127.0.0.1 into the folder, and return their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        names = (x509.DNSName(dns_name), _LOOPBACK)
        certificate = _certificate(dns_name, names, key, self.key, self.certificate.subject)
        (folder / "tls.key").write_bytes(_private(key))
        (folder / "tls.crt").write_bytes(certificate.public_bytes(_PEM))
        return str(folder / "tls.crt"), str(folder / "tls.key")


def peer_settings(folder: Path, authority: Authority, name: str = "repertory") -> dict[str, Any]:
    """Return the settings of a pod's listeners for other pods, with a certificate of the authority."""
    certificate, key = authority.issue(folder, name)
    return {
        "peer_grpc_listen": "127.0.0.1:0",
        "peer_http_listen": "127.0.0.1:0",
        "peer_tls_cert": certificate,
        "peer_tls_key": key,
        "peer_tls_ca": str(authority.write(folder / "ca.pem")),
    }


def _certificate(
    common_name: str,
    names: tuple[x509.GeneralName, ...],
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey | None,
    issuer: x509.Name | None,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(
        issuer or subject,
        subject,
        key.public_key(),
        x509.random_serial_number(),
        now - datetime.timedelta(minutes=1),
        now + datetime.timedelta(days=1),
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=signer is None, path_length=None), critical=True)
    return builder.sign(signer or key, hashes.SHA256())


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
