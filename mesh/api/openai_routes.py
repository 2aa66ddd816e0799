"""Forwards the HTTP APIs whose body names the model: every POST below /v1, and vLLM's tokenization."""

from aiohttp import web

from mesh.api.http_body import InferenceBody, decode
from mesh.api.http_gateway import HttpGateway

_PATHS = ("/v1/{path:.+}", "/tokenize", "/detokenize")


class OpenAiRoutes:
    def __init__(self, gateway: HttpGateway) -> None:
        self._gateway = gateway

    def add_to(self, router: web.UrlDispatcher) -> None:
        for path in _PATHS:
            router.add_post(path, self._post)

    async def _post(self, request: web.Request) -> web.StreamResponse:
        body = await self._gateway.read(request)
        asked = decode(body, InferenceBody)
        return await self._gateway.forward(request, body, asked.model, wants_events=asked.stream is True)
