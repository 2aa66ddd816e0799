"""Lists all routes of the runtime's HTTP application, from which it serves them and describes them in /openapi.json."""

from aiohttp import web

from runtime.api.anthropic.messages import Messages
from runtime.api.health import Health
from runtime.api.oip.rest import RestInference
from runtime.api.ollama.routes import Ollama
from runtime.api.openai.chat import ChatCompletions
from runtime.api.openai.completions import Completions
from runtime.api.openai.embeddings import Embeddings, EmbeddingsAnswer, EmbeddingsBody
from runtime.api.openai.models import ModelEntry, ModelList, Models
from runtime.api.openai.responses import Answer, ChatChoice, CompletionChoice
from runtime.api.openai.tokenize import DetokenizeAnswer, TokenizeAnswer, Tokenizing
from runtime.api.openai.types import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from runtime.api.openai_responses.items import Response
from runtime.api.openai_responses.route import Responses
from runtime.api.openai_responses.types import ResponsesBody
from runtime.api.openapi import openapi_document
from runtime.api.route import Route
from runtime.api.tgi.routes import TextGeneration
from runtime.config.schema import RuntimeConfig
from runtime.errors import NotSupported
from runtime.generation.generator import Generator
from runtime.interfaces import ModelDirectory
from runtime.observability.metrics import RuntimeMetrics

_EVENTS = "text/event-stream"
# Routes of other servers that clients try.
_UNSUPPORTED_PATHS = (
    "/v1/rerank",
    "/v1/score",
    "/v1/moderations",
    "/v1/audio/{path:.+}",
    "/v1/images/{path:.+}",
)


def http_routes(
    directory: ModelDirectory, generator: Generator, config: RuntimeConfig, metrics: RuntimeMetrics
) -> list[Route]:
    """Return the routes. Where one path matches several, the first one serves it."""
    health = Health(directory, metrics)
    routes = [
        *_openai(directory, generator),
        *Messages(directory, generator).routes(),
        *RestInference(directory, generator).routes(),
        *Ollama(directory, generator).routes(),
        *TextGeneration(directory, generator, device=config.engine.device).routes(),
        Route("GET", "/health", health.health, "Report whether requests are taken"),
        Route("GET", "/ping", health.health, "Report whether requests are taken"),
        Route("GET", "/metrics", health.metrics, "Prometheus metrics"),
        *(Route("POST", path, _refuse_path, "Refused: not supported") for path in _UNSUPPORTED_PATHS),
    ]

    async def describe(request: web.Request) -> web.Response:
        return web.Response(body=document, content_type="application/json")

    routes.append(Route("GET", "/openapi.json", describe, "This description"))
    document = openapi_document(routes)
    return routes


def _openai(directory: ModelDirectory, generator: Generator) -> list[Route]:
    chat = ChatCompletions(directory, generator)
    completions = Completions(directory, generator)
    embeddings = Embeddings(directory, generator)
    models = Models(directory)
    tokenizing = Tokenizing(directory)
    responses = Responses(directory, generator)
    return [
        Route("POST", "/v1/chat/completions", chat.post, "Answer a chat", ChatBody, Answer[ChatChoice], _EVENTS),
        Route(
            "POST",
            "/v1/completions",
            completions.post,
            "Complete prompts",
            CompletionBody,
            Answer[CompletionChoice],
            _EVENTS,
        ),
        Route("POST", "/v1/responses", responses.post, "Answer items", ResponsesBody, Response, _EVENTS),
        Route("POST", "/v1/embeddings", embeddings.post, "Make vectors of texts", EmbeddingsBody, EmbeddingsAnswer),
        Route("GET", "/v1/models", models.get_all, "List the loaded models", answer=ModelList),
        Route("GET", "/v1/models/{id:.+}", models.get_one, "Describe a loaded model", answer=ModelEntry),
        Route("POST", "/tokenize", tokenizing.tokenize, "Tokenize a text or a chat", TokenizeBody, TokenizeAnswer),
        Route("POST", "/detokenize", tokenizing.detokenize, "Detokenize", DetokenizeBody, DetokenizeAnswer),
    ]


async def _refuse_path(request: web.Request) -> web.Response:
    raise NotSupported(f"POST {request.path} is not supported yet; use /v1/chat/completions or /v1/completions")
