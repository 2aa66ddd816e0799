"""GET /v1/models and /v1/models/{id}: the models loaded here. The mesh answers these itself for all registered models."""

import msgspec
from aiohttp import web

from runtime.api.model_lookup import find_model
from runtime.api.openai.context import json_response
from runtime.interfaces import ModelDirectory, ServedModel


class Status(msgspec.Struct, frozen=True):
    value: str


class ModelEntry(msgspec.Struct, frozen=True):
    """One model in OpenAI's shape. As vLLM has them, `root` is the place of its files, and `parent` the base whose LoRA adapter it is."""

    id: str
    created: int
    max_model_len: int
    root: str
    object: str = "model"
    owned_by: str = "repertory"
    status: Status = Status("loaded")
    parent: str | None = None


class ModelList(msgspec.Struct, frozen=True):
    data: list[ModelEntry]
    object: str = "list"


class Models:
    def __init__(self, directory: ModelDirectory) -> None:
        self._directory = directory

    async def get_all(self, request: web.Request) -> web.Response:
        return json_response(ModelList([_entry(model) for model in self._directory.list()]))

    async def get_one(self, request: web.Request) -> web.Response:
        """Return one model, whose id may contain slashes."""
        return json_response(_entry(find_model(self._directory, None, request.match_info["id"])))


def _entry(model: ServedModel) -> ModelEntry:
    return ModelEntry(
        model.name,
        int(model.loaded_at_s),
        model.facts.max_model_len,
        model.root or model.model_id,
        parent=model.base_name or None,
    )
