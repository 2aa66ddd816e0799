"""A runtime process that computes nothing, with its sockets in a folder: `python -m bench.idle_runtime FOLDER [SWITCHES]`.

SWITCHES is a JSON object of tests.support.fake_runtime.Switches. SIGUSR1 switches between answering and hanging inference calls.
"""

import asyncio
import json
import signal
import sys
from pathlib import Path

import uvloop

from tests.support.fake_runtime import FakeRuntime, Switches


async def _serve(folder: Path, switches: Switches) -> None:
    runtime = FakeRuntime(folder, switches=switches)

    def toggle() -> None:
        switches.mute = not switches.mute
        runtime.tell()

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, toggle)
    await runtime.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve(Path(sys.argv[1]), Switches(**json.loads(sys.argv[2] if len(sys.argv) > 2 else "{}"))))
