"""Finds the LoRA adapter that a request selects beside its model, in the fields of LoRAX, vLLM and TGIS.

An adapter is a registered name. As in LoRAX and vLLM, a request may also give the location of an adapter's files, which registers it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from mesh.access.caller import current_caller
from mesh.api.registrar import Registrar
from mesh.errors import InvalidRequest, NotFound, NotSupported, PermissionDenied
from mesh.registry.registration import model_info
from mesh.registry.registry import Registry


class AdapterFields(msgspec.Struct, frozen=True):
    """The fields of a body that select an adapter. A foreign runtime may give them other types, so they are checked later."""

    adapter_id: Any = None
    adapter_source: Any = None
    adapter_parameters: Any = None
    lora_request: Any = None


@dataclass(frozen=True, slots=True)
class AdapterChoice:
    """The adapter `name`, which the request's field `param` selects. `uri`: where its files are, "" if it must be registered."""

    param: str
    name: str
    uri: str = ""


class _LoraRequest(msgspec.Struct, frozen=True):
    """vLLM's LoRARequest, without its number, which is valid inside one vLLM only."""

    lora_name: str
    lora_path: str = ""


def choice_of(fields: AdapterFields) -> AdapterChoice | None:
    """Return the adapter that a body selects, None if it selects none. Raises InvalidRequest, NotSupported."""
    if fields.adapter_parameters:
        raise NotSupported("adapter_parameters is not supported: adapters are not merged; send one adapter_id")
    if fields.adapter_id:
        name = _text("adapter_id", fields.adapter_id)
        return _from_source(name, _text("adapter_source", fields.adapter_source or ""))
    if not fields.lora_request:
        return None
    try:
        asked = msgspec.convert(fields.lora_request, _LoraRequest)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"lora_request is not as expected: {error}") from None
    return AdapterChoice("lora_request", asked.lora_name, asked.lora_path)


class AdapterChooser:
    """`is_foreign`: whether this pod's runtime is not Repertory's; then only the runtime knows its adapters."""

    def __init__(self, registry: Registry, registrar: Registrar, is_foreign: Callable[[], bool]) -> None:
        self._registry = registry
        self._registrar = registrar
        self._is_foreign = is_foreign

    async def choose(
        self, base: str | None, selected: Callable[[], AdapterChoice | None], *, virtual: bool = False
    ) -> str | None:
        """Return the name to call: that of the adapter which `selected` reads from the request, else `base`.

        A request from another pod is resolved already and returns `base`. An adapter with a URI that is not registered yet is registered over `base`,
        which needs the scope `management`. Raises InvalidRequest for a name that is not registered or not an adapter of `base`, PermissionDenied, and
        NotFound for an unknown base.
        """
        if current_caller().is_peer or self._is_foreign() or (choice := selected()) is None:
            return base
        if not base:
            return choice.name
        base_id = await self._registry.resolve_known(base, virtual=virtual)
        try:
            model_id = await self._registry.resolve_known(choice.name, virtual=False)
        except NotFound:
            await self._register(base, choice)
            return choice.name
        if model_id == base_id:
            return base
        record = self._registry.models.get(model_id)
        own_base = await self._registry.base_of(record.info) if record is not None else None
        if record is None or own_base is None or own_base[0] != base_id:
            raise InvalidRequest(f"{choice.param}: {choice.name!r} is not an adapter of {base!r}", param=choice.param)
        if choice.uri and choice.uri != record.path:
            raise InvalidRequest(
                f"{choice.param}: {choice.name!r} is registered with files from elsewhere; send its name alone",
                param=choice.param,
            )
        return choice.name

    async def _register(self, base: str, choice: AdapterChoice) -> None:
        if not choice.uri:
            raise InvalidRequest(
                f"{choice.param}: {choice.name!r} is not registered; register it as an adapter of {base!r} first",
                param=choice.param,
            )
        if not current_caller().may_manage:
            raise PermissionDenied(
                f"{choice.param}: {choice.name!r} is not registered, and key {current_caller().name} may not register it"
            )
        await self._registrar.register(
            choice.name, model_info(choice.name, choice.uri, {"adapter_of": base}), load=False
        )


def _from_source(name: str, source: str) -> AdapterChoice:
    """Return the choice of LoRAX's `adapter_id` with its `adapter_source`. A path becomes a name without its scheme and first slash."""
    match source:
        case "":
            return AdapterChoice("adapter_id", name)
        case "hub":
            return AdapterChoice("adapter_id", name, f"hf://{name}")
        case "local":
            return AdapterChoice("adapter_id", name.strip("/"), name)
        case "s3":
            path = name.removeprefix("s3://")
            return AdapterChoice("adapter_id", path.strip("/"), f"s3://{path}")
    raise NotSupported(f"adapter_source {source!r} is not supported: send hub, local or s3")


def _text(param: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"{param} must be a string", param=param)
    return value
