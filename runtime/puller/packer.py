"""Runs the packer process and forwards its progress."""

import subprocess
import sys
import threading
from contextlib import suppress
from typing import IO

import msgspec

from common.parent import child_environment
from runtime.errors import LoadFailed, from_code
from runtime.models.model_state import Phase
from runtime.puller.pack.request import PackDone, PackEvent, PackFailed, PackProgress, PackRequest
from runtime.puller.progress import PullJob

_STDERR_LINES = 20
_POLL_S = 0.1


def run_packer(request: PackRequest, job: PullJob) -> None:
    """Fill the packed directory; blocks. Raises the error that the packer reports, LoadFailed if it dies, OSError (ENOSPC) on a full disk."""
    command = [sys.executable, "-m", "runtime.puller.pack"]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=child_environment(),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    last: list[PackEvent] = []
    errors: list[bytes] = []
    readers = [
        threading.Thread(target=_read_events, args=(process.stdout, job, last), daemon=True),
        threading.Thread(target=_keep_tail, args=(process.stderr, errors), daemon=True),
    ]
    try:
        with suppress(BrokenPipeError):
            process.stdin.write(msgspec.json.encode(request))
            process.stdin.close()
        for reader in readers:
            reader.start()
        while process.poll() is None:
            job.wait(_POLL_S)
        for reader in readers:
            reader.join()
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        for reader in readers:
            if reader.is_alive():
                reader.join(5.0)
        process.stdout.close()
        process.stderr.close()
    match last[-1] if last else None:
        case PackDone():
            return
        case PackFailed(code=code, message=message, errno=number):
            if number:
                raise OSError(number, message)
            raise from_code(code, message)
    tail = b"".join(errors[-3:]).decode(errors="replace").strip()
    raise LoadFailed(
        f"the packer process ended with status {process.returncode} and no result (status -9 usually means that memory ran out): {tail}"
    )


def _read_events(stream: IO[bytes], job: PullJob, last: list[PackEvent]) -> None:
    decoder = msgspec.json.Decoder(PackEvent)
    for line in stream:
        with suppress(msgspec.DecodeError):
            event = decoder.decode(line)
            last[:] = [event]
            if isinstance(event, PackProgress):
                job.say(Phase.PACKING, event.done_bytes, event.total_bytes, event.text)


def _keep_tail(stream: IO[bytes], lines: list[bytes]) -> None:
    for line in stream:
        lines.append(line)
        del lines[:-_STDERR_LINES]
