"""Builds and runs the parts of a pod that has an Envoy in front: its files, its control stream and its data plane."""

import asyncio
import logging

from mesh.api.envoy_clusters import PeerTls
from mesh.api.envoy_control import EnvoyControl
from mesh.api.routes.openai_routes import MODEL_IN_BODY_PATHS
from mesh.api.web_guard import policy_for
from mesh.client.envoy_admin import EnvoyAdmin
from mesh.envoy.bootstrap import envoy_files, write_bootstrap, write_tls
from mesh.envoy.data_plane import DataPlane
from mesh.envoy.files import write_whole
from mesh.envoy.name_table import Names
from mesh.envoy.plan import Carrier, Here
from mesh.envoy.routes import RouteSettings, routes_text
from mesh.pod.carried_names import carried_names, runtime_addresses
from mesh.pod.placement_parts import PlacementParts, PodBase

logger = logging.getLogger(__name__)


class PodEnvoy:
    """The parts of one pod, not started."""

    def __init__(self, base: PodBase, parts: PlacementParts) -> None:
        config = base.config
        self._config = config
        self._access = base.access
        self._own_id = base.instance_id
        self._has_peers_tls = base.access.peer_tls is not None
        self._files = envoy_files(config)
        self._written: RouteSettings | None = None
        secure = base.registry.instances.secure_address
        names = carried_names(
            base, parts, secure_address=secure if self._has_peers_tls else lambda _: "", carries_limited=True
        )
        self._monitor = parts.monitor
        self._admin = EnvoyAdmin(self._files.admin)
        self._data_plane = DataPlane(
            names,
            parts.copies,
            base.changes,
            base.metrics,
            self._admin,
            parts.carried,
            here=self._here,
            is_ready=lambda: parts.monitor.limits is not None,
            write_files=self._write_files,
        )
        self._control = EnvoyControl(self._files.control, self._peer_tls, self._data_plane.adopt)
        self._data_plane.control_by(self._control)

    @property
    def is_connected(self) -> bool:
        return self._control.is_connected

    async def start(self) -> None:
        """Write Envoy's files and open its control socket. Raises ConfigError, OSError."""
        write_bootstrap(self._config)
        self._write_files(0, {})
        await self._control.start()

    async def run(self) -> None:
        await self._data_plane.run()

    async def withdraw(self, model_id: str) -> None:
        """Withdraw the model as LocalUnloads does."""
        await self._data_plane.withdraw(model_id)

    async def drain(self, grace_s: float) -> None:
        """Have Envoy take no further connections, and return when the calls that it carries have ended or the grace period is over."""
        await self._admin.stop_listening()
        try:
            async with asyncio.timeout(grace_s):
                await self._admin.idle()
        except TimeoutError:
            logger.warning("Envoy still carries calls after the grace period of %g s", grace_s)

    async def stop(self) -> None:
        await self._control.stop()
        await self._admin.close()

    def _here(self) -> Here:
        hop, peer_key = (value for _, value in self._access.peers.headers())
        return Here(
            runtime=runtime_addresses(self._config),
            mesh={carrier: self._files.mesh(carrier) for carrier in Carrier},
            hop=hop,
            peer_key="" if self._has_peers_tls else peer_key,
            pings_runtime=not self._monitor.snapshot.foreign,
        )

    def _peer_tls(self) -> PeerTls | None:
        identity = self._access.peer_tls
        return PeerTls(identity.material, self._access.peer_name) if identity is not None else None

    def _write_files(self, limit: int, names: Names) -> None:
        """Write the files that follow keys, certificates and copies, if they have changed."""
        if self._access.tls is not None:
            write_tls(self._files, self._access.tls.material)
        config, keys = self._config, self._access.keys
        settings = RouteSettings(
            keys=keys.all() if keys.is_required else None,
            peer_digests=self._access.peers.digests(),
            limit=limit,
            paths=MODEL_IN_BODY_PATHS,
            max_body_bytes=config.http_max_body_bytes,
            max_message_bytes=config.grpc_max_message_bytes,
            web_policy=policy_for(
                config.http_listen, (*config.allowed_hosts, config.advertise_host), config.cors_origins
            ),
            names=names,
        )
        if settings == self._written:
            return
        for carrier in Carrier:
            if write_whole(self._files.routes(carrier), routes_text(carrier, settings)):
                logger.debug("wrote Envoy's routes of %s", carrier)
        self._written = settings
