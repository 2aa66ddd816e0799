"""How a test starts the fake engine in the real one's place."""

import sys
from pathlib import Path

import msgspec

from runtime.config.schema import EngineConfig
from runtime.engine_client.client import CommandBuilder


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
