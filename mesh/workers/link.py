"""Sends and receives messages over a connected socket: four bytes of length, then MessagePack."""

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any, Generic, TypeVar

import msgspec

T = TypeVar("T")

_LENGTH_BYTES = 4


class Link(Generic[T]):
    """One end of a connection. `kind`: the union of the messages that arrive."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kind: Any) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kind)
        self._encoder = msgspec.msgpack.Encoder()

    @classmethod
    async def over(cls, connected: socket.socket, kind: Any) -> "Link[T]":
        """Return the link over a connected unix socket."""
        return cls(*await asyncio.open_unix_connection(sock=connected), kind)

    def send(self, message: msgspec.Struct) -> None:
        """Send a message, or drop it if the other end has gone."""
        if not self._writer.is_closing():
            encoded = self._encoder.encode(message)
            self._writer.write(len(encoded).to_bytes(_LENGTH_BYTES, "big") + encoded)

    async def messages(self) -> AsyncIterator[T]:
        """Yield messages until the other end has gone."""
        while True:
            try:
                length = int.from_bytes(await self._reader.readexactly(_LENGTH_BYTES), "big")
                encoded = await self._reader.readexactly(length)
            except (asyncio.IncompleteReadError, ConnectionError):
                return
            yield self._decoder.decode(encoded)

    def close(self) -> None:
        self._writer.close()
