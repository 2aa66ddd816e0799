"""Reads a YAML file that declares models and aliases, and keeps a mesh's registrations equal to it.

models:
  smol: {uri: "hf://HuggingFaceTB/SmolLM2-135M-Instruct", quantize: nf4, load: true}
aliases:
  prod: smol
"""

import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from common.clock import epoch_ms
from common.config import read_mapping
from common.errors import ConfigError
from mesh.errors import InvalidRequest, MeshError
from mesh.registry.registration import DEFAULT_TYPE, check_name, model_info
from mesh.registry.registry import Registry
from mesh.types import Loader

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeclaredModel:
    """One entry below `models:`. `settings` are those of a registration; `load` asks for a load at once."""

    name: str
    uri: str
    type: str
    settings: Mapping[str, Any]
    load: bool = False


@dataclass(frozen=True, slots=True)
class ModelsFile:
    models: tuple[DeclaredModel, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)  # alias: name

    @property
    def names(self) -> frozenset[str]:
        return frozenset(model.name for model in self.models)


class _Entry(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of an entry that are not settings of the model."""

    uri: str
    type: str = DEFAULT_TYPE
    load: bool = False


def read_models_file(file: Path | str) -> ModelsFile:
    """Read and check a whole file. Raises ConfigError that names the file, the model and the field."""
    content = read_mapping(file)
    if unknown := sorted(set(content) - {"models", "aliases"}):
        raise ConfigError(f"models file {file}: unknown section {unknown[0]!r}; known: aliases, models")
    models = content.get("models") or {}
    aliases = content.get("aliases") or {}
    if not isinstance(models, dict) or not isinstance(aliases, dict):
        raise ConfigError(f"models file {file}: `models:` and `aliases:` must hold `NAME: …` lines")
    try:
        found = tuple(_declared(str(name), entry) for name, entry in models.items())
        for alias in aliases:
            check_name(str(alias))
    except (InvalidRequest, msgspec.ValidationError) as error:
        raise ConfigError(f"models file {file}: {error}") from None
    for alias, target in aliases.items():
        if alias in models:
            raise ConfigError(f"models file {file}: {alias} is both a model and an alias")
        if not isinstance(target, str):
            raise ConfigError(f"models file {file}: alias {alias}: expected the name of a model")
    return ModelsFile(found, {str(alias): target for alias, target in aliases.items()})


def _declared(name: str, entry: object) -> DeclaredModel:
    check_name(name)
    if isinstance(entry, str):
        entry = {"uri": entry}
    if not isinstance(entry, dict) or not entry.get("uri"):
        raise InvalidRequest(f"model {name}: uri is missing: it says where the files are")
    try:
        own = msgspec.convert({key: entry[key] for key in entry if key in _Entry.__struct_fields__}, _Entry)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"model {name}: {error}") from None
    settings = {key: value for key, value in entry.items() if key not in _Entry.__struct_fields__}
    model_info(name, own.uri, settings, model_type=own.type)  # checks them
    return DeclaredModel(name, own.uri, own.type, settings, own.load)


class DeclaredModels:
    """Applies a models file to a registry, at the start and whenever the file is read again.

    A name that an earlier reading declared and the file no longer has is removed. Other names are left alone.
    """

    def __init__(self, file: str, registry: Registry, loader: Loader, *, is_loaded: Callable[[str], bool]) -> None:
        self._file = file
        self._registry = registry
        self._loader = loader
        self._is_loaded = is_loaded
        self._applied = ModelsFile()

    async def apply(self) -> None:
        """Read the file and register what it declares. A file that cannot be read changes nothing and is logged.

        One model that cannot be registered or loaded is logged, and the others are processed.
        """
        try:
            wanted = read_models_file(self._file)
        except ConfigError as error:
            logger.error("%s; the registrations stay as they are", error)
            return
        for model in wanted.models:
            await self._log_errors(f"model {model.name}", self._register(model))
        for alias, target in wanted.aliases.items():
            await self._log_errors(
                f"alias {alias}",
                self._registry.set_alias(alias, target, now_ms=epoch_ms(), is_loaded=self._is_loaded),
            )
        for alias in self._applied.aliases.keys() - wanted.aliases.keys() - wanted.names:
            await self._log_errors(f"alias {alias}", self._registry.remove_alias(alias))
        for name in self._applied.names - wanted.names - wanted.aliases.keys():
            await self._log_errors(f"model {name}", self._remove(name))
        self._applied = wanted

    async def _register(self, model: DeclaredModel) -> None:
        before = self._registry.find_named(model.name)
        info = model_info(model.name, model.uri, model.settings, model_type=model.type)
        target_id = await self._registry.register_name(model.name, info, now_ms=epoch_ms(), is_loaded=self._is_loaded)
        if before is None:
            logger.info("model %s is new: %s", model.name, model.uri)
        elif before.target_id != target_id:
            logger.info("model %s is replaced: %s", model.name, model.uri)
        if model.load:
            await self._loader.ensure_loaded(target_id)

    async def _remove(self, name: str) -> None:
        model_id = await self._registry.resolve_fresh(name)
        await self._registry.remove_name(name)
        if self._registry.models.get(model_id) is None:
            await self._loader.unload(model_id)
        logger.info("model %s is removed: the models file no longer has it", name)

    async def _log_errors(self, what: str, work: Coroutine[Any, Any, object]) -> None:
        try:
            await work
        except MeshError as error:
            logger.warning("models file %s: %s: %s", self._file, what, error.message)
