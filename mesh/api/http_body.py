"""Reading a request's body within limits, and the little that the mesh looks at in it. Knows no routes."""

import asyncio
import hashlib
from typing import TypeVar

import msgspec
from aiohttp import web

from mesh.errors import DeadlineExceeded, InvalidRequest, TooLarge

T = TypeVar("T")

_IDLE_S = 60.0  # a body that stands still for so long is not coming
_PREFIX_BYTES = 1024


class Ask(msgspec.Struct, frozen=True):
    """Of an OpenAI request, all that the mesh knows."""

    model: str | None = None
    stream: bool | None = None


async def read_body(request: web.Request, limit_bytes: int) -> bytes:
    """As it was before any Content-Encoding. Raises TooLarge before more than the limit has been read, DeadlineExceeded if the rest doesn't come, InvalidRequest if it can't be
    decoded."""
    length = request.content_length
    if length is not None and length > limit_bytes:
        raise TooLarge(f"the body is {length} bytes long; the limit is {limit_bytes} bytes")
    chunks: list[bytes] = []
    size_bytes = 0
    while True:
        try:
            async with asyncio.timeout(_IDLE_S):
                chunk = await request.content.readany()
        except web.RequestPayloadError:
            raise InvalidRequest("the body is not what its Content-Encoding says") from None
        except TimeoutError:
            raise DeadlineExceeded(f"the body stopped after {size_bytes} bytes") from None
        if not chunk:
            return b"".join(chunks)
        size_bytes += len(chunk)
        if size_bytes > limit_bytes:
            raise TooLarge(f"the body is longer than the limit of {limit_bytes} bytes")
        chunks.append(chunk)


def decode(body: bytes, kind: type[T]) -> T:
    """Raises InvalidRequest with what is wrong, and where."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"the body is not as expected: {error}") from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None


def prefix_hash(body: bytes) -> str:
    """The same for prompts that begin alike: where their cache may be. Opaque."""
    return hashlib.blake2b(body[:_PREFIX_BYTES], digest_size=8).hexdigest()
