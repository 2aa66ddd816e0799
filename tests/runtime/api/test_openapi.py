"""The runtime's /openapi.json: complete, and true under schemathesis' requests, well-formed or not."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from runtime.api.http_routes import http_routes
from runtime.api.openapi import openapi_document
from runtime.api.route import Route
from runtime.config.schema import RuntimeConfig
from runtime.generation.generator import Generator
from runtime.observability.metrics import RuntimeMetrics
from tests.runtime.api.test_tools import HERMES
from tests.support import tokenizers as tiny
from tests.support.openai_server import Server, serve
from tests.support.scripted_engine import Directory, ScriptedEngine, served
from tests.support.thread_server import in_thread

TRUTHS = ("status_code_conformance", "content_type_conformance", "response_schema_conformance")
KNOWN = {"name": "m1", "id": "m1", "version": "1"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = served(tiny.byte_level(tmp_path_factory.mktemp("m"), chat_template=HERMES), "m1", max_model_len=2000)
    with in_thread(lambda: serve(ScriptedEngine(lambda asked: [5, 6, 0]), model)) as found:
        yield found


@pytest.fixture(scope="module")
def api(server: Server) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def routes() -> list[Route]:
    metrics = RuntimeMetrics()
    generator = Generator(ScriptedEngine(lambda asked: []), metrics)
    return http_routes(Directory([]), generator, RuntimeConfig(), metrics)


def fuzzed() -> Iterator[tuple[str, str, GenerationMode]]:
    """Each route with well-formed requests and, if it has a body, with malformed ones."""
    for route in routes():
        for mode in GenerationMode if route.body is not None else (GenerationMode.POSITIVE,):
            yield re.sub(r":[^}]*", "", route.path), route.method, mode


@pytest.mark.parametrize(("path", "method", "mode"), list(fuzzed()))
def test_openapi_is_true_of_any_request(api: Any, path: str, method: str, mode: GenerationMode) -> None:
    """Every answer has a declared status, content type and schema, and no request makes an unexpected error."""
    operation = api[path][method]

    @settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        if isinstance(case.body, dict):
            case.body = {**case.body, "model": "m1"}
        case.path_parameters = {name: KNOWN.get(name, value) for name, value in case.path_parameters.items()}
        response = case.call_and_validate(checks=[CHECKS.get_one(name) for name in TRUTHS])
        assert response.status_code != 500, response.text

    check()


def test_openapi_describes_every_route_once() -> None:
    document = json.loads(openapi_document(routes()))
    described = [(verb, path) for path, verbs in document["paths"].items() for verb in verbs]
    assert len(described) == len(routes())
    assert ("post", "/v2/models/{name}/versions/{version}/infer") in described
    references = {text for text in json.dumps(document).split('"') if text.startswith("#/components/schemas/")}
    assert {each.rpartition("/")[2] for each in references} <= set(document["components"]["schemas"])
    of_chat = document["paths"]["/v1/chat/completions"]["post"]
    assert set(of_chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
