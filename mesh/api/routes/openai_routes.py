"""Forwards the HTTP APIs whose body names the model: OpenAI's and Anthropic's below /v1, and vLLM's tokenization.

Our runtime's paths are known, so that a request to another one is answered without loading its model. A foreign runtime may have any path.
"""

from collections.abc import Callable

from aiohttp import web

from mesh.api.adapter_choice import AdapterChooser, choice_of
from mesh.api.http_body import InferenceBody, decode
from mesh.api.http_gateway import HttpGateway

MODEL_IN_BODY_PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
)
# The runtime refuses these, and says what it lacks.
_REFUSED_PATHS = (
    "/v1/rerank",
    "/v1/score",
    "/v1/moderations",
    "/v1/audio/{path:.+}",
    "/v1/images/{path:.+}",
)


class OpenAiRoutes:
    """`is_foreign`: whether this pod's runtime is not Repertory's."""

    def __init__(self, gateway: HttpGateway, adapters: AdapterChooser, *, is_foreign: Callable[[], bool]) -> None:
        self._gateway = gateway
        self._adapters = adapters
        self._is_foreign = is_foreign

    def add_to(self, router: web.UrlDispatcher) -> None:
        for path in (*MODEL_IN_BODY_PATHS, *_REFUSED_PATHS):
            router.add_post(path, self._post)
        self._other = router.add_resource("/v1/{path:.+}")
        self._other.add_route("*", self._post_other)

    async def _post(self, request: web.Request) -> web.StreamResponse:
        body = await self._gateway.read(request)
        asked = decode(body, InferenceBody)
        name = await self._adapters.choose(asked.model, lambda: choice_of(asked))
        return await self._gateway.forward(request, body, name, wants_events=asked.stream is True)

    async def _post_other(self, request: web.Request) -> web.StreamResponse:
        """Forward to a foreign runtime. Raises HTTPMethodNotAllowed for a path that other routes have, else HTTPNotFound."""
        if request.method == "POST" and self._is_foreign():
            return await self._post(request)
        allowed: set[str] = set()
        for resource in request.app.router.resources():
            if resource is not self._other:
                _, methods = await resource.resolve(request)
                allowed |= methods
        if allowed:
            raise web.HTTPMethodNotAllowed(request.method, allowed)
        raise web.HTTPNotFound
