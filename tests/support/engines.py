"""Starts the fake engine in the place of the real one, and records what its client reports."""

import sys
from collections.abc import Collection
from pathlib import Path

import msgspec

from runtime.config.schema import EngineConfig
from runtime.engine_client.client import CommandBuilder
from runtime.engine_client.lifecycle import EngineDeath
from runtime.errors import RepertoryError


class RecordingListener:
    """Implements EngineListener. A model that the engine drops by itself fails the test."""

    def __init__(self) -> None:
        self.readied: list[set[str]] = []
        self.deaths: list[EngineDeath] = []

    def engine_ready(self, models: Collection[str]) -> None:
        self.readied.append(set(models))

    def engine_died(self, death: EngineDeath) -> None:
        self.deaths.append(death)

    def engine_dropped(self, model_id: str, error: RepertoryError) -> None:
        raise AssertionError(model_id)


def fake_command(
    *, journal: Path | None = None, stillborn: bool = False, unfit: str = "", load_s: float = 0.3, step_s: float = 0.002
) -> CommandBuilder:
    """A builder of argument vectors for `EngineClient(command=…)`."""

    def build(socket_path: Path, config: EngineConfig, crash_marker_path: Path) -> list[str]:
        command = [
            sys.executable,
            "-m",
            "tests.support.fake_engine",
            "--socket",
            str(socket_path),
            "--config",
            msgspec.json.encode(config).decode(),
            "--crash-marker",
            str(crash_marker_path),
            "--load-s",
            str(load_s),
            "--step-s",
            str(step_s),
        ]
        if journal is not None:
            command += ["--journal", str(journal)]
        if stillborn:
            command.append("--stillborn")
        if unfit:
            command += ["--unfit", unfit]
        return command

    return build
