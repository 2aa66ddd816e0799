"""`python -m runtime.engine` as the front starts it, with a tiny real model on the CPU."""

import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from runtime.config.schema import EngineConfig
from runtime.ipc.crash_marker import CrashMarker
from runtime.ipc.messages import Add, Command, Event, Hello, Load, Loaded, Shutdown, Tokens
from runtime.types import Checkpoint, FinishReason, GenerationRequest, SamplingParams, StopParams
from tests.support.checkpoints import tiny_llama

WAIT_S = 120.0
CONFIG = EngineConfig(device="cpu", device_budget_bytes=32 << 20, slab_bytes=1 << 18, debug_checks=True, num_threads=1)


class Front:
    """The front's end of one engine process."""

    def __init__(self, folder: Path) -> None:
        path, self.crash_marker_path = folder / "engine.sock", folder / "crash-marker"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(WAIT_S)
        command = [
            sys.executable,
            "-m",
            "runtime.engine",
            "--socket",
            str(path),
            "--config",
            msgspec.json.encode(CONFIG).decode(),
        ]
        self.process = subprocess.Popen([*command, "--crash-marker", str(self.crash_marker_path)])
        self.connection, _ = listener.accept()
        self.connection.settimeout(WAIT_S)
        listener.close()
        self._stream = self.connection.makefile("rb")
        self._decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)

    def send(self, command: Command) -> None:
        body = msgspec.msgpack.encode(command)
        self.connection.sendall(struct.pack("<I", len(body)) + body)

    def events(self) -> Iterator[Event]:
        while len(head := self._stream.read(4)) == 4:
            yield self._decoder.decode(self._stream.read(struct.unpack("<I", head)[0]))

    def hang_up(self) -> None:
        self._stream.close()
        self.connection.close()


@pytest.mark.slow
def test_main_serves_until_shutdown(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    files = tuple(map(str, sorted(folder.glob("*.safetensors"))))
    front = Front(tmp_path)
    try:
        events = front.events()
        hello = next(events)
        assert isinstance(hello, Hello)
        assert (hello.pid, hello.device, hello.device_budget_bytes) == (front.process.pid, "cpu", 32 << 20)
        front.send(Load("m", Checkpoint(str(folder), files)))
        assert any(isinstance(event, Loaded) for event in events)
        front.send(
            Add(
                1,
                "m",
                GenerationRequest(
                    prompt=(5, 6, 7),
                    sampling=SamplingParams(temperature=0.0),
                    stop=StopParams(12, ignore_eos=True),
                ),
            )
        )
        front.send(Shutdown(60.0))
        rows = [row for event in events if isinstance(event, Tokens) for row in event.rows]
        assert len([token for row in rows for token in row.tokens]) == 12
        assert rows[-1].finish is FinishReason.LENGTH
        assert front.process.wait(WAIT_S) == 0
        assert CrashMarker(front.crash_marker_path).read() is None
    finally:
        front.process.kill()
        front.process.wait()
        front.hang_up()


@pytest.mark.slow
def test_main_exits_when_front_disconnects(tmp_path: Path) -> None:
    front = Front(tmp_path)
    try:
        assert isinstance(next(front.events()), Hello)
        front.hang_up()
        assert front.process.wait(WAIT_S) == 0
    finally:
        front.process.kill()
        front.process.wait()
