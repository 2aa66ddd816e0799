"""Frames on the engine's socket: a msgpack message behind its length as four little-endian bytes."""

import struct
from collections.abc import Iterator
from typing import Generic, TypeVar

import msgspec

M = TypeVar("M")

MAX_FRAME_BYTES = 256 * 1024 * 1024
_LENGTH = struct.Struct("<I")


class FrameTooLarge(ValueError):
    """A message is longer than the limit. A frame that claims to be is taken for a broken stream."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(f"a message of {num_bytes} bytes exceeds the frame limit of {MAX_FRAME_BYTES} bytes")


def encode_frame(encoder: msgspec.msgpack.Encoder, message: object) -> bytes:
    """Encode a message with its length. Raises FrameTooLarge."""
    body = encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise FrameTooLarge(len(body))
    return _LENGTH.pack(len(body)) + body


class FrameReader(Generic[M]):
    """Cuts received bytes into messages. An incomplete frame waits for the bytes that follow."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[M]) -> None:
        self._decoder = decoder
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[M]:
        """Yield the messages that `data` completes. Raises FrameTooLarge and msgspec.MsgspecError; the stream is then unusable."""
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= _LENGTH.size:
            (num_bytes,) = _LENGTH.unpack_from(buffer, start)
            if num_bytes > MAX_FRAME_BYTES:
                raise FrameTooLarge(num_bytes)
            end = start + _LENGTH.size + num_bytes
            if len(buffer) < end:
                break
            with memoryview(buffer) as view:
                message = self._decoder.decode(view[start + _LENGTH.size : end])
            start = end
            yield message
        if start:
            del buffer[:start]
