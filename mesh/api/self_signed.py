"""Makes a self-signed certificate, for a port whose clients do not verify it."""

import datetime
import ssl
import tempfile
from pathlib import Path

_VALID_FOR = datetime.timedelta(days=3650)


def self_signed_context(common_name: str) -> ssl.SSLContext:
    """Return a server's context with a fresh key, which leaves no file behind."""
    # These modules take 9 MB, and only a port with `metrics_tls` needs them.
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = x509.CertificateBuilder(
        name, name, key.public_key(), x509.random_serial_number(), now, now + _VALID_FOR
    ).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "identity.pem"
        file.touch(mode=0o600)
        file.write_bytes(private + certificate.public_bytes(pem))
        context.load_cert_chain(file)
    return context
