"""Ends processes that a killed `repertory serve` left running. Each supervised process is recorded in a file."""

from contextlib import suppress
from pathlib import Path

import psutil

_SAME_START_S = 2.0  # a process id with another start time belongs to another process
_TIMEOUT_S = 10.0


def record(file: Path, pid: int) -> None:
    """Write down a process that has just been started."""
    with suppress(psutil.Error):
        file.write_text(f"{pid} {psutil.Process(pid).create_time()}")


def end_recorded(file: Path) -> bool:
    """Kill the recorded process and wait until it is gone. Returns False if it does not run any more."""
    process = _recorded(file)
    if process is not None:
        with suppress(psutil.Error):
            process.kill()
            process.wait(_TIMEOUT_S)
    file.unlink(missing_ok=True)
    return process is not None


def _recorded(file: Path) -> psutil.Process | None:
    with suppress(OSError, ValueError, psutil.Error):
        pid, started_s = file.read_text().split()
        process = psutil.Process(int(pid))
        if abs(process.create_time() - float(started_s)) < _SAME_START_S:
            return process
    return None
