"""Registers the models that a pod's configuration lists: ModelMesh's MM_AUTO_REGISTER_MODELS."""

import logging
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import field

from common.clock import epoch_ms
from common.errors import ConfigError
from mesh.errors import MeshError
from mesh.registry.registry import Registry
from mesh.registry.vmodel_plan import VModelRequest
from mesh.types import Loader, ModelInfo

logger = logging.getLogger(__name__)


class StaticModel(msgspec.Struct, frozen=True):
    model_id: str = field(name="modelId")
    info: ModelInfo = field(name="modelInfo")
    vmodel_id: str = field(default="", name="vModelId")
    ensure_loaded: bool = field(default=False, name="ensureLoaded")


def parse_static_models(text: str) -> tuple[StaticModel, ...]:
    """Read a JSON list, `@FILE`, or empty text. Raises ConfigError."""
    if not text:
        return ()
    try:
        content = Path(text[1:]).read_bytes() if text.startswith("@") else text.encode()
        return msgspec.json.decode(content, type=tuple[StaticModel, ...])
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"static_models: {error}") from None


async def register_static_models(
    models: tuple[StaticModel, ...], registry: Registry, loader: Loader, *, is_loaded: Callable[[str], bool]
) -> None:
    """Register each model, and load those that ask for it. One that cannot be registered or loaded is logged; the others are processed."""
    for model in models:
        now_ms = epoch_ms()
        try:
            if model.vmodel_id:
                request = VModelRequest(model.vmodel_id, model.model_id, info=model.info)
                await registry.vmodels.set(request, now_ms=now_ms, is_loaded=is_loaded)
            else:
                await registry.models.register(model.model_id, model.info, last_used_ms=now_ms)
            if model.ensure_loaded:
                await loader.ensure_loaded(model.model_id, last_used_ms=now_ms, wait=True)
        except MeshError as error:
            logger.warning("static model %s: %s", model.model_id, error.message)
