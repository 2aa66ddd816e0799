"""`python -m runtime` with bench.fast_engine in the engine's place. BENCH_STEP_S and BENCH_VOCAB set its step and vocabulary."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import uvloop

from common import logs
from runtime.__main__ import Runtime
from runtime.config.loader import configure
from runtime.config.schema import EngineConfig, RuntimeConfig


def _command(socket_path: Path, config: EngineConfig, crash_marker_path: Path) -> list[str]:
    pace, vocab = os.environ.get("BENCH_STEP_S", "0.01"), os.environ.get("BENCH_VOCAB", "1024")
    return [sys.executable, "-m", "bench.fast_engine", "--socket", str(socket_path), "--step-s", pace, "--vocab", vocab]


async def _serve(config: RuntimeConfig) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return await Runtime(config, [config.engine], command=_command).run(stop)


if __name__ == "__main__":
    configuration = configure(sys.argv[1:], os.environ)
    logs.set_up(as_json=configuration.log_json, level=configuration.log_level)
    sys.exit(uvloop.run(_serve(configuration)))
