"""Serves vLLM's routes that load and unload LoRA adapters, which register and remove an adapter's name."""

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from aiohttp import web

from mesh.access.caller import current_caller
from mesh.api.http_body import decode, read_body
from mesh.api.registrar import Registrar
from mesh.api.request_log import Record
from mesh.errors import LoadFailed
from mesh.placement.placement import Placement
from mesh.registry.registration import base_of, belongs_to, model_info
from mesh.registry.registry import Registry
from mesh.types import ModelStatus

_BODY_BYTES = 64 * 1024
_UNSAFE = re.compile(r"[^\w.\-]", re.ASCII)


class _Load(msgspec.Struct, frozen=True):
    """`base_model_name` is needed where several models could be the base."""

    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False
    base_model_name: str | None = None


class _Unload(msgspec.Struct, frozen=True):
    lora_name: str = ""


class _Problem(msgspec.Struct, frozen=True):
    """vLLM's shape of an error."""

    message: str
    type: str
    code: int
    param: str | None = None


class LoraRoutes:
    def __init__(self, registry: Registry, placement: Placement, registrar: Registrar) -> None:
        self._registry = registry
        self._placement = placement
        self._registrar = registrar

    def add_to(self, router: web.UrlDispatcher) -> None:
        router.add_post("/v1/load_lora_adapter", self.load)
        router.add_post("/v1/unload_lora_adapter", self.unload)

    async def load(self, request: web.Request) -> web.Response:
        """Register an adapter and load it, then respond. A name that this call registered is removed again if the load fails."""
        body = await read_body(request, _BODY_BYTES)
        asked = decode(body, _Load)
        name = asked.lora_name
        if not name or not asked.lora_path:
            return _refusal("Both 'lora_name' and 'lora_path' must be provided.")
        current_caller().check_model(name)
        known = self._registry.find_named(name)
        if known is not None and not base_of(known.record.info):
            return _refusal(f"The name '{name}' is that of a model, which an adapter cannot replace.")
        if known is not None and not asked.load_inplace:
            return _refusal(
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set 'load_inplace' to True."
            )
        base = asked.base_model_name or (base_of(known.record.info) if known is not None else "")
        bases = self._bases()
        if not base and len(bases) != 1:
            return _refusal(f"'base_model_name' must be provided: {len(bases)} models could be the base.")
        info = model_info(name, asked.lora_path, {"adapter_of": base or bases[0]})
        model_id = (await self._registrar.register(name, info, load=False)).model_id
        Record.of(request).model_id = model_id
        if known is not None and known.model_id == model_id:
            await self._placement.unload(model_id)  # the same path, whose files may be others now
        status = await self._placement.ensure_loaded(model_id, wait=True, retry_failed=True)
        if status.status is not ModelStatus.LOADED:
            if known is None:
                await self._registrar.remove(name)
            raise LoadFailed(status.errors[0] if status.errors else "it could not be loaded", model=name)
        return web.Response(
            text=f"Success: LoRA adapter '{name}' added successfully.", headers=_warning(decode(body, dict[str, Any]))
        )

    async def unload(self, request: web.Request) -> web.Response:
        """Remove an adapter's name and unload its copies, then respond."""
        name = decode(await read_body(request, _BODY_BYTES), _Unload).lora_name
        if not name:
            return _refusal("'lora_name' needs to be provided to unload a LoRA adapter.")
        current_caller().check_model(name)
        known = self._registry.find_named(name)
        if known is None or not base_of(known.record.info):
            return _refusal(f"The lora adapter '{name}' cannot be found.", HTTPStatus.NOT_FOUND)
        Record.of(request).model_id = await self._registrar.remove(name)
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")

    def _bases(self) -> list[str]:
        """Return one name of each model that is not an adapter."""
        return [
            named.name
            for named in self._registry.named()
            if not base_of(named.record.info)
            and (named.name == named.model_id or belongs_to(named.target_id, named.name))
            and current_caller().may_use(named.name)
        ]


def _warning(fields: Mapping[str, object]) -> dict[str, str]:
    """Return the header that names the fields of a load which have no effect."""
    unknown = [_UNSAFE.sub("?", name)[:64] for name in fields if name not in _Load.__struct_fields__]
    return {"Warning": f'299 repertory "unknown fields were ignored: {", ".join(unknown[:16])}"'} if unknown else {}


def _refusal(message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> web.Response:
    kind = "NotFoundError" if status is HTTPStatus.NOT_FOUND else "InvalidUserInput"
    body = msgspec.json.encode({"error": _Problem(message, kind, int(status))})
    return web.Response(body=body, status=status, content_type="application/json")
