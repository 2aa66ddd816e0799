"""Answers GET /: a small page for a browser and JSON for other clients, which say what this is and what is loaded."""

import html
from collections.abc import Callable

import msgspec
from aiohttp import web

from mesh.api.model_view import ModelViews
from mesh.client.admin import Model

_ABOUT = "Serves many language models by name: any registered model is loaded when it is called."
_LINKS = {
    "/v1/models": "registered models",
    "/openapi.json": "the HTTP API",
    "/metrics": "Prometheus metrics",
    "/readyz": "readiness",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Vary": "Accept",
}
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:50rem;margin:2rem auto;padding:0 1rem}"
    "td,th{text-align:left;padding:.2rem 1.5rem .2rem 0;overflow-wrap:anywhere}"
)


class Shown(msgspec.Struct, frozen=True):
    """A model as the page shows it."""

    name: str
    state: str
    tier: str


class Root(msgspec.Struct, frozen=True):
    """`models` is null where requests need a key, since this page needs none."""

    name: str
    version: str
    about: str
    links: dict[str, str]
    models: list[Shown] | None


class RootPage:
    """`requires_keys`: whether requests need a key, as it is now."""

    def __init__(self, views: ModelViews, version: str, requires_keys: Callable[[], bool]) -> None:
        self._views = views
        self._version = version
        self._requires_keys = requires_keys

    def add_to(self, router: web.UrlDispatcher) -> None:
        router.add_get("/", self._get)

    async def _get(self, request: web.Request) -> web.Response:
        """Describe this server and the models that are loaded."""
        models = None if self._requires_keys() else [_shown(name, model) for name, model in self._views.states()]
        root = Root("repertory", self._version, _ABOUT, _LINKS, models)
        if "text/html" in request.headers.get("Accept", ""):
            return web.Response(text=_page(root), content_type="text/html", headers=_HEADERS)
        return web.Response(body=msgspec.json.encode(root), content_type="application/json", headers=_HEADERS)


def _shown(name: str, model: Model | None) -> Shown:
    return Shown(name, (model.state if model else "") or "not loaded", model.tier if model else "")


def _page(root: Root) -> str:
    links = "".join(f'<li><a href="{path}">{path}</a> {about}</li>' for path, about in root.links.items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Repertory</title><style>{_STYLE}</style>'
        f"<h1>Repertory {html.escape(root.version)}</h1><p>{root.about}</p><ul>{links}</ul>{_table(root.models)}</html>"
    )


def _table(models: list[Shown] | None) -> str:
    if models is None:
        return "<p>Models are listed to callers with a key: send it to /v1/models.</p>"
    if not models:
        return "<p>No model is registered. Register one with <code>repertory register NAME URI</code>.</p>"
    rows = "".join(
        f"<tr><td>{html.escape(each.name)}<td>{html.escape(each.state)}<td>{html.escape(each.tier)}" for each in models
    )
    return f"<table><tr><th>Model<th>State<th>Memory{rows}</table>"
