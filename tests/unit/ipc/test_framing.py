"""Frames: messages survive any split of the stream, and a length over the limit is refused at both ends."""

import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.ipc import framing
from runtime.ipc.framing import FrameReader, FrameTooLarge, encode_frame
from runtime.ipc.messages import Abort

ENCODER = msgspec.msgpack.Encoder()


def reader() -> FrameReader[Abort]:
    return FrameReader(msgspec.msgpack.Decoder(Abort))


@given(st.lists(st.lists(st.integers(0, 2**40)).map(lambda ids: Abort(tuple(ids)))), st.integers(1, 40))
def test_reader_yields_every_message_for_any_split(messages: list[Abort], chunk_bytes: int) -> None:
    stream = b"".join(encode_frame(ENCODER, message) for message in messages)
    frames = reader()
    chunks = [stream[start : start + chunk_bytes] for start in range(0, len(stream), chunk_bytes)]
    assert [message for chunk in chunks for message in frames.feed(chunk)] == messages


def test_reader_yields_what_precedes_an_oversized_length() -> None:
    received = reader().feed(encode_frame(ENCODER, Abort((1,))) + struct.pack("<I", framing.MAX_FRAME_BYTES + 1))
    assert next(received) == Abort((1,))
    with pytest.raises(FrameTooLarge, match=str(framing.MAX_FRAME_BYTES + 1)):
        next(received)


def test_encode_refuses_a_message_over_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framing, "MAX_FRAME_BYTES", 8)
    with pytest.raises(FrameTooLarge, match="exceeds the frame limit of 8 bytes"):
        encode_frame(ENCODER, Abort(tuple(range(100))))
