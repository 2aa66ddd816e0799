"""Makes the OpenAPI 3.1 document of routes: paths from their templates, schemas from the structs that parse and encode the bodies."""

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from common.version import package_version
from runtime.api.openai.responses import ErrorAnswer
from runtime.api.route import Route

_VARIABLE = re.compile(r"\{(\w+)(?::[^}]*)?\}")
_REFERENCE = "#/components/schemas/{name}"
_JSON = "application/json"


def openapi_document(routes: Sequence[Route]) -> bytes:
    """Return the document as JSON."""
    types: list[Any] = [ErrorAnswer]
    for route in routes:
        types += [kind for kind in (route.body, route.answer, route.error) if kind is not None and kind not in types]
    found, components = msgspec.json.schema_components(types, ref_template=_REFERENCE)
    schemas = list(zip(types, found, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = _VARIABLE.sub(r"{\1}", route.path)
        paths.setdefault(path, {}).setdefault(route.method.lower(), _operation(route, schemas))
    document = {
        "openapi": "3.1.0",
        "info": {"title": "Repertory runtime", "version": package_version()},
        "paths": paths,
        "components": {"schemas": components},
    }
    return msgspec.json.encode(document)


def _operation(route: Route, schemas: Sequence[tuple[Any, dict[str, Any]]]) -> dict[str, Any]:
    def content(kind: Any) -> dict[str, Any]:
        return {_JSON: {"schema": next(schema for known, schema in schemas if known is kind or known == kind)}}

    answers: dict[str, Any] = {} if route.answer is None else content(route.answer)
    if route.stream:
        answers[route.stream.partition(";")[0]] = {}
    errors = content(route.error or ErrorAnswer)
    operation: dict[str, Any] = {
        "summary": route.summary,
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for name in _VARIABLE.findall(route.path)
        ],
        "responses": {
            "200": {"description": "The answer", **({"content": answers} if answers else {})},
            "4XX": {"description": "The request is refused", "content": errors},
            "5XX": {"description": "The request failed, or asks for what is not supported (501)", "content": errors},
        },
    }
    if route.body is not None:
        operation["requestBody"] = {"required": True, "content": content(route.body)}
    return operation
