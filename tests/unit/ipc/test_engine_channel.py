"""The engine's channel: messages in both directions, and the end of a connection."""

import queue
import socket
import struct
import threading

import msgspec
import pytest

from runtime.ipc import framing
from runtime.ipc.engine_channel import Channel
from runtime.ipc.framing import encode_frame
from runtime.ipc.messages import Abort, Command, Event, Load, RowTokens, Shutdown, Tokens, Unloaded
from runtime.types import Checkpoint

WAIT_S = 10.0


@pytest.fixture
def ends() -> tuple[socket.socket, Channel]:
    front, engine = socket.socketpair()
    return front, Channel(engine)


def frame(command: Command) -> bytes:
    return encode_frame(msgspec.msgpack.Encoder(), command)


def read_events(front: socket.socket, count: int) -> list[Event]:
    decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)
    stream = front.makefile("rb")
    return [decoder.decode(stream.read(struct.unpack("<I", stream.read(4))[0])) for _ in range(count)]


def test_channel_delivers_commands_whole_and_in_order(ends: tuple[socket.socket, Channel]) -> None:
    front, channel = ends
    commands: list[Command] = [Load("m", Checkpoint("/x" * 100_000)), Abort(tuple(range(1000))), Shutdown(1.5)]
    data = b"".join(frame(command) for command in commands)

    def send() -> None:
        for start in range(0, len(data), 7919):
            front.sendall(data[start : start + 7919])

    sender = threading.Thread(target=send)
    sender.start()
    assert [channel.inbox.get(timeout=WAIT_S) for _ in commands] == commands
    sender.join()
    front.close()
    assert channel.inbox.get(timeout=WAIT_S) is None
    channel.close()


def test_channel_sends_queued_events_before_it_closes(ends: tuple[socket.socket, Channel]) -> None:
    front, channel = ends
    events: list[Event] = [Tokens("m", tuple(RowTokens(i, (i, n)) for i in range(50))) for n in range(300)]
    for event in [*events, Unloaded("m")]:
        channel.emit(event)
    closer = threading.Thread(target=channel.close)
    closer.start()
    assert read_events(front, 301) == [*events, Unloaded("m")]
    assert front.recv(1) == b""
    closer.join()


@pytest.mark.parametrize("garbage", [struct.pack("<I", 3) + b"abc", struct.pack("<I", 0xFFFFFFFF)])
def test_channel_ends_at_bytes_that_are_no_command(ends: tuple[socket.socket, Channel], garbage: bytes) -> None:
    front, channel = ends
    front.sendall(frame(Abort((1,))) + garbage)
    assert channel.inbox.get(timeout=WAIT_S) == Abort((1,))
    assert channel.inbox.get(timeout=WAIT_S) is None
    with pytest.raises(queue.Empty):
        channel.inbox.get_nowait()
    channel.close()
    front.close()


def test_channel_emits_to_a_closed_connection_without_error(ends: tuple[socket.socket, Channel]) -> None:
    front, channel = ends
    front.close()
    for _ in range(200):
        channel.emit(Tokens("m", tuple(RowTokens(i, (1,)) for i in range(500))))
    assert channel.inbox.get(timeout=WAIT_S) is None
    channel.close()


def test_channel_ends_at_an_event_over_the_limit(
    ends: tuple[socket.socket, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    front, channel = ends
    monkeypatch.setattr(framing, "MAX_FRAME_BYTES", 64)
    channel.emit(Tokens("m", tuple(RowTokens(i, (1,)) for i in range(100))))
    assert channel.inbox.get(timeout=WAIT_S) is None
    channel.close()
    front.close()
