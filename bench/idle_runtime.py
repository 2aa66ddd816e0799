"""A runtime process that computes nothing, with its sockets in a folder: `python -m bench.idle_runtime FOLDER`."""

import asyncio
import sys
from pathlib import Path

import uvloop

from tests.support.fake_runtime import FakeRuntime


async def _serve(folder: Path) -> None:
    await FakeRuntime(folder).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve(Path(sys.argv[1])))
