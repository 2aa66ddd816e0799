"""Assembles what decides who may use a pod: callers' keys, the pods' shared secret, and the certificates of the listeners."""

import asyncio

from mesh.access.certificate_name import dns_name_of
from mesh.access.guard import Guard
from mesh.access.key_table import KeyTable
from mesh.access.peer_keys import PeerKeys
from mesh.access.tls import TlsIdentity
from mesh.config.schema import MeshConfig
from mesh.errors import InvalidRequest
from mesh.store.protocol import Store


class Access:
    """`root`: the prefix of the mesh's keys in the store. `tls` is None for plain listeners, `peer_tls` without a listener for peers.

    `peer_name`: the name that the other pods' certificates must carry.

    Raises ConfigError or InvalidRequest for settings that do not fit together.
    """

    def __init__(self, config: MeshConfig, store: Store, root: str, own_id: str, *, has_peers: bool) -> None:
        self.peers = PeerKeys(store, f"{root}/peerKey", own_id)
        self.keys = KeyTable(config.api_keys, config.api_keys_file)
        self.guard = Guard(self.keys, self.peers)
        self.tls = callers_identity(config)
        self.peer_tls = _identity(
            config, "peer_tls_cert", "peer_tls_key", "peer_tls_ca", "peer_grpc_listen", "peer_http_listen"
        )
        if self.tls is not None and has_peers and self.peer_tls is None:
            raise InvalidRequest(
                "tls_cert needs a listener for other pods, which connect with certificates of their own: set peer_tls_cert, "
                "peer_tls_key, peer_tls_ca, peer_grpc_listen and peer_http_listen"
            )

        self.peer_name = config.peer_tls_name
        if self.peer_tls is not None and not self.peer_name:
            self.peer_name = dns_name_of(self.peer_tls.material.certificate)

    async def start(self) -> None:
        """Raises StoreError."""
        await self.peers.start()

    async def run(self) -> None:
        """Follow changes of keys, secret and certificates."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.peers.run())
            tasks.create_task(self.keys.run())
            for identity in (self.tls, self.peer_tls):
                if identity is not None:
                    tasks.create_task(identity.run())


def callers_identity(config: MeshConfig) -> TlsIdentity | None:
    """Return the identity of the listeners for callers, None for plain text. Raises ConfigError, InvalidRequest."""
    return _identity(config, "tls_cert", "tls_key", *(("tls_client_ca",) if config.tls_client_ca else ()))


def _identity(config: MeshConfig, *names: str) -> TlsIdentity | None:
    """Return the identity of the settings, of which all or none must be given; the first two or three are its files."""
    values = {name: str(getattr(config, name)) for name in names}
    if not any(values.values()):
        return None
    if missing := [name for name, value in values.items() if not value]:
        raise InvalidRequest(f"{', '.join(missing)} is missing; {', '.join(names)} belong together")
    return TlsIdentity(*list(values.values())[:3])
