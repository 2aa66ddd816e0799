"""Makes gRPC's server credentials of a TLS identity. They follow its changes at each handshake."""

import grpc

from mesh.access.tls import TlsIdentity


def server_credentials(identity: TlsIdentity) -> grpc.ServerCredentials:
    """Return credentials that require a certificate of the client if the identity has an authority."""
    given = identity.generation

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal given
        if given == identity.generation:
            return None
        given = identity.generation
        return _configuration(identity)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(identity),
        changed,  # type: ignore[arg-type]  # the stubs do not know that None stands for no change
        require_client_authentication=bool(identity.material.authority),
    )


def _configuration(identity: TlsIdentity) -> grpc.ServerCertificateConfiguration:
    material = identity.material
    return grpc.ssl_server_certificate_configuration([(material.key, material.certificate)], material.authority or None)
