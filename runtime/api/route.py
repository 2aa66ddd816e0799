"""Describes one HTTP route: how it is served, and what the API description says about it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Route:
    """`path` is aiohttp's template. `body`, `answer` and `error` are the types of the JSON bodies; None = there is no JSON body.

    `stream` is the content type of the answer to a request that asks for a stream; empty = it cannot.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    body: Any = None
    answer: Any = None
    stream: str = ""
    error: Any = None
