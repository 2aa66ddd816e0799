"""Decodes compressed HTTP bodies within a size limit."""

import zlib

_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS  # accept either header
_RAW_DEFLATE = -zlib.MAX_WBITS


class InflateError(ValueError):
    """The bytes are not what their Content-Encoding says."""


class InflateLimitError(ValueError):
    """The decoded body exceeds the limit."""


def inflate(body: bytes, encoding: str, limit_bytes: int) -> bytes:
    """Undo the Content-Encoding `gzip` or `deflate`. Raises InflateError, or InflateLimitError before more than the limit is decoded."""
    try:
        return _decoded(body, _GZIP_OR_ZLIB, limit_bytes)
    except zlib.error:
        pass
    if encoding == "deflate":
        # Some clients send deflate without zlib's header.
        try:
            return _decoded(body, _RAW_DEFLATE, limit_bytes)
        except zlib.error:
            pass
    raise InflateError


def _decoded(body: bytes, window_bits: int, limit_bytes: int) -> bytes:
    decoder = zlib.decompressobj(window_bits)
    decoded = decoder.decompress(body, limit_bytes + 1)
    if len(decoded) > limit_bytes:
        raise InflateLimitError
    if not decoder.eof:
        raise zlib.error("incomplete")
    return decoded
