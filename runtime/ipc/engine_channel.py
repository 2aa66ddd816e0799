"""The socket between the engine and its front: two threads that keep encoding, decoding and waiting away from the engine thread.

Frames are runtime.ipc.messages'. Knows no command and no event by name.
"""

import contextlib
import queue
import socket
import struct
import threading

import msgspec

from runtime.ipc.messages import MAX_FRAME_BYTES, Command, Event

_LENGTH = struct.Struct("<I")
_READ_BYTES = 1 << 20
_MOST_EVENTS = 64  # sent with one system call


class Channel:
    """`inbox` gets every command, and None once the front is gone (also when it sends what can't be read)."""

    def __init__(self, connection: socket.socket) -> None:
        self.inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._connection = connection
        self._outbox: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="engine-reader", daemon=True)
        self._writer = threading.Thread(target=self._write, name="engine-writer", daemon=True)
        self._reader.start()
        self._writer.start()

    def emit(self, event: Event) -> None:
        """Queue an event; never blocks."""
        self._outbox.put(event)

    def close(self) -> None:
        """Send what is queued, then hang up."""
        self._outbox.put(None)
        self._writer.join(timeout=5.0)
        with contextlib.suppress(OSError):  # the front hung up first
            self._connection.shutdown(socket.SHUT_RDWR)
        self._reader.join(timeout=5.0)
        self._connection.close()

    def _read(self) -> None:
        decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
        buffer = bytearray()
        try:
            while data := self._connection.recv(_READ_BYTES):
                buffer += data
                start = 0
                while len(buffer) - start >= _LENGTH.size:
                    (length,) = _LENGTH.unpack_from(buffer, start)
                    if length > MAX_FRAME_BYTES:
                        return
                    end = start + _LENGTH.size + length
                    if len(buffer) < end:
                        break
                    self.inbox.put(decoder.decode(bytes(buffer[start + _LENGTH.size : end])))
                    start = end
                del buffer[:start]
        except (OSError, msgspec.MsgspecError):
            return  # a front that can't be heard is gone
        finally:
            self.inbox.put(None)

    def _write(self) -> None:
        encoder = msgspec.msgpack.Encoder()
        open_ = True
        while open_:
            events = [self._outbox.get()]
            while len(events) < _MOST_EVENTS and not self._outbox.empty():
                events.append(self._outbox.get())
            frames = bytearray()
            for event in events:
                if event is None:
                    open_ = False
                    break
                body = encoder.encode(event)
                frames += _LENGTH.pack(len(body))
                frames += body
            try:
                self._connection.sendall(frames)
            except OSError:
                return  # the reader says that the front is gone
