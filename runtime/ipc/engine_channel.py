"""The engine's end of the socket: two threads encode, decode and wait, so that the engine thread never does."""

import contextlib
import logging
import queue
import socket
import threading

import msgspec

from runtime.ipc.framing import FrameReader, FrameTooLarge, encode_frame
from runtime.ipc.messages import Command, Event

logger = logging.getLogger(__name__)

_READ_BYTES = 1 << 20
_MAX_EVENTS_PER_SEND = 64


class Channel:
    """Receives commands into `inbox` and sends events.

    `inbox` receives None after the last command: the front has closed the connection, or has sent bytes that are not a command.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._connection = connection
        self._outbox: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="engine-reader", daemon=True)
        self._writer = threading.Thread(target=self._write, name="engine-writer", daemon=True)
        self._reader.start()
        self._writer.start()

    def emit(self, event: Event) -> None:
        """Queue an event without blocking."""
        self._outbox.put(event)

    def close(self) -> None:
        """Send the queued events, then close the connection."""
        self._outbox.put(None)
        self._writer.join(timeout=5.0)
        with contextlib.suppress(OSError):  # the front may have closed it first
            self._connection.shutdown(socket.SHUT_RDWR)
        self._reader.join(timeout=5.0)
        self._connection.close()

    def _read(self) -> None:
        decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
        frames = FrameReader(decoder)
        try:
            while data := self._connection.recv(_READ_BYTES):
                for command in frames.feed(data):
                    self.inbox.put(command)
        except (OSError, FrameTooLarge, msgspec.MsgspecError):
            return
        finally:
            self.inbox.put(None)

    def _write(self) -> None:
        encoder = msgspec.msgpack.Encoder()
        is_open = True
        while is_open:
            events = [self._outbox.get()]
            while len(events) < _MAX_EVENTS_PER_SEND and not self._outbox.empty():
                events.append(self._outbox.get())
            frames = bytearray()
            try:
                for event in events:
                    if event is None:
                        is_open = False
                        break
                    frames += encode_frame(encoder, event)
                self._connection.sendall(frames)
            except FrameTooLarge:
                logger.exception("an event cannot be sent; closing the connection")
                with contextlib.suppress(OSError):
                    self._connection.shutdown(socket.SHUT_RDWR)
                return
            except OSError:
                return  # the reader reports that the front is gone
