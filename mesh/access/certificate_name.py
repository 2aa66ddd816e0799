"""Reads the name under which pods reach each other from a certificate that they share."""

from common.errors import ConfigError

_WILDCARD = "*."


def dns_name_of(certificate: bytes) -> str:
    """Return the first DNS name of the first certificate in a PEM text. A wildcard stands for a name that it covers. Raises ConfigError."""
    from cryptography import x509  # It takes 9 MB, and pods without TLS between them do not need it.

    try:
        extensions = x509.load_pem_x509_certificate(certificate).extensions
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)
    except (ValueError, x509.ExtensionNotFound):
        names = []
    if not names:
        raise ConfigError("peer_tls_name is empty and peer_tls_cert has no DNS name; set peer_tls_name to a name in it")
    name: str = names[0]
    return f"pod.{name.removeprefix(_WILDCARD)}" if name.startswith(_WILDCARD) else name
