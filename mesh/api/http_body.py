"""Reads the body of an HTTP request within limits and decodes JSON bodies."""

import asyncio
import hashlib
import re
from typing import TypeVar

import msgspec
from aiohttp import web

from common.inflate import InflateError, InflateLimitError, inflate
from mesh.api.adapter_choice import AdapterFields
from mesh.api.request_memory import HeldMemory
from mesh.errors import DeadlineExceeded, InvalidRequest, TooLarge

T = TypeVar("T")

_IDLE_S = 60.0  # a client that sends nothing for this time counts as disconnected
BODY_TIMEOUT_S = web.AppKey("body_timeout_s", float)
_PREFIX_BYTES = 1024
_FIELD = re.compile(r"(?:at `\$\.|missing required field `)(\w+)")


class InferenceBody(AdapterFields, frozen=True):
    """The fields of an OpenAI request that the mesh reads."""

    model: str | None = None
    stream: bool | None = None


async def read_body(request: web.Request, limit_bytes: int, memory: HeldMemory | None = None) -> bytes:
    """Return the body with its Content-Encoding undone, in a thread: a small compressed body may be large.

    The body is accounted for in `memory`, before it is read if its length is known. Raises Overloaded, TooLarge before more than the limit has been read or decoded, DeadlineExceeded if the client stops sending, InvalidRequest if decoding
    fails.
    """
    length = request.content_length
    if length is not None and length > limit_bytes:
        raise TooLarge(
            f"the body is {length} bytes long; the limit is {limit_bytes} bytes", limit=limit_bytes, value=length
        )
    if memory is not None:
        memory.add(length or 0)
    chunks: list[bytes] = []
    size_bytes = 0
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + request.app[BODY_TIMEOUT_S]
    while True:
        try:
            async with asyncio.timeout_at(min(loop.time() + _IDLE_S, deadline_s)):
                chunk = await request.content.readany()
        except web.RequestPayloadError:
            raise InvalidRequest("the body ended early") from None
        except TimeoutError:
            raise DeadlineExceeded(f"the body stopped or was too slow after {size_bytes} bytes") from None
        if not chunk:
            body = await _decoded(request, b"".join(chunks), limit_bytes)
            if memory is not None:
                memory.add(len(body) - max(size_bytes, length or 0))
            return body
        size_bytes += len(chunk)
        if memory is not None and length is None:
            memory.add(len(chunk))
        if size_bytes > limit_bytes:
            raise TooLarge(f"the body is longer than the limit of {limit_bytes} bytes", limit=limit_bytes)
        chunks.append(chunk)


async def _decoded(request: web.Request, body: bytes, limit_bytes: int) -> bytes:
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise InvalidRequest(f"Content-Encoding {encoding!r} is not supported; send gzip, deflate or identity")
    try:
        return await asyncio.to_thread(inflate, body, encoding, limit_bytes)
    except InflateLimitError:
        raise TooLarge(f"the decoded body is longer than the limit of {limit_bytes} bytes", limit=limit_bytes) from None
    except InflateError:
        raise InvalidRequest("the body is not what its Content-Encoding says") from None


def decode(body: bytes, kind: type[T]) -> T:
    """Decode a JSON body. Raises InvalidRequest, which names the field at fault."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        at = _FIELD.search(str(error))
        raise InvalidRequest(f"the body is not as expected: {error}", param=at[1] if at else None) from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None


def prefix_hash(body: bytes) -> str:
    """Return the same opaque text for prompts that begin alike, so that routing can find the copy that has them cached."""
    return hashlib.blake2b(body[:_PREFIX_BYTES], digest_size=8).hexdigest()
