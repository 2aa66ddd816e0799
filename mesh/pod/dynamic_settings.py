"""Connects ModelMesh's dynamic settings to what they change in this process: the log's level and its lines of requests."""

from common import logs
from mesh.api.request_log import log_requests
from mesh.config.schema import MeshConfig
from mesh.registry.dynamic_config import DynamicConfig
from mesh.store.protocol import Store


def dynamic_settings(store: Store, prefix: str, config: MeshConfig) -> DynamicConfig:
    """Return what follows the keys below `prefix`. A deleted key restores the setting of `config`, which applies from now on."""

    def log_each_invocation(text: str | None) -> None:
        log_requests(config.log_requests if text is None else text.lower() == "true")

    log_requests(config.log_requests)
    return DynamicConfig(
        store,
        prefix,
        {
            "logger_level": lambda level: logs.set_level(level or config.log_level),
            "log_each_invocation": log_each_invocation,
        },
    )
