"""Runs a command or a function in a pseudo-terminal of a given size, types into it, and returns what the screen shows."""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

_CONTROL = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\x1b[=>78]|([\r\n\b\x07])|([^\x1b\r\n\b\x07]+)|\x1b")

_TYPING_S = 0.2  # readline shows its prompt shortly before it reads keys and signals


@dataclass(frozen=True, slots=True)
class Screen:
    """`text` is what the terminal shows at the end, `raw` everything that was written to it."""

    text: str
    raw: str
    status: int


def run_in_terminal(
    command: Sequence[str],
    *,
    columns: int = 80,
    rows: int = 50,
    environment: dict[str, str] | None = None,
    typed: Sequence[tuple[str, str]] = (),
    timeout_s: float = 60.0,
) -> Screen:
    """Run a command until it ends. Each of `typed` is a text to wait for, then the keys to press (`\\x03` is Ctrl-C).

    Raises AssertionError with what was shown if the command outlasts `timeout_s`.
    """
    terminal, inner = _open_terminal(columns, rows)
    process = subprocess.Popen(
        command,
        stdin=inner,
        stdout=inner,
        stderr=inner,
        env={**_plain_environment(), **(environment or {})},
        start_new_session=True,
        preexec_fn=_take_terminal,
    )
    os.close(inner)
    pending, raw, seen = list(typed), "", 0
    end_s = time.monotonic() + timeout_s
    try:
        while True:
            if pending and (found := raw.find(pending[0][0], seen)) >= 0:
                seen = found + len(pending[0][0])
                time.sleep(_TYPING_S)
                os.write(terminal, pending.pop(0)[1].encode())
            readable, _, _ = select.select([terminal], [], [], 0.05)
            if readable:
                chunk = _read(terminal)
                if not chunk:
                    break
                raw += chunk
            elif process.poll() is not None:
                break
            assert time.monotonic() < end_s, f"{command} did not end; it showed:\n{raw}"
        status = process.wait(timeout=10)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(terminal)
    return Screen(screen_text(raw), raw, status)


def call_in_terminal(
    call: Callable[[], int], *, columns: int = 80, rows: int = 50, environment: dict[str, str] | None = None
) -> Screen:
    """Call a function of this process whose standard input and outputs are the terminal. It returns an exit status or raises SystemExit."""
    terminal, inner = _open_terminal(columns, rows)
    chunks: list[str] = []

    def read() -> None:
        while chunk := _read(terminal):
            chunks.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with _streams_on(inner), _environment({**_plain_environment(), **(environment or {})}):
            os.close(inner)
            try:
                status = call()
            except SystemExit as ended:
                status = int(ended.code or 0)
    finally:
        reader.join()
        os.close(terminal)
    raw = "".join(chunks)
    return Screen(screen_text(raw), raw, status)


def _open_terminal(columns: int, rows: int) -> tuple[int, int]:
    terminal, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    return terminal, inner


@contextlib.contextmanager
def _streams_on(file: int) -> Iterator[None]:
    """Replace this process's standard streams, and their descriptors, by which libraries find the width of the terminal."""
    kept_streams = sys.stdin, sys.stdout, sys.stderr
    kept_files = [os.dup(number) for number in range(3)]
    for number in range(3):
        os.dup2(file, number)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(os.dup(file), mode, encoding="utf-8") for mode in "rww")
    try:
        yield
    finally:
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            stream.close()
        sys.stdin, sys.stdout, sys.stderr = kept_streams
        for number, kept in enumerate(kept_files):
            os.dup2(kept, number)
            os.close(kept)


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    kept = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def _take_terminal() -> None:
    """Make standard input the controlling terminal, and let Ctrl-C interrupt, which a shell switches off for programs in the background."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def screen_text(raw: str) -> str:
    """Return what a terminal shows after these characters, without colours. Long lines are not wrapped, so that a test can see them."""
    lines, row, column = [""], 0, 0
    for control in _CONTROL.finditer(raw):
        numbers, letter, single, text = control.groups()
        if text:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
        elif single == "\n":
            row += 1
            if row == len(lines):
                lines.append("")
        elif single == "\r":
            column = 0
        elif single == "\b":
            column = max(column - 1, 0)
        elif letter == "A":
            row = max(row - int(numbers or 1), 0)
        elif letter == "K":
            lines[row] = "" if numbers == "2" else lines[row][:column]
    return "\n".join(line.rstrip() for line in lines).strip("\n") + "\n"


def _read(terminal: int) -> str:
    try:
        return os.read(terminal, 65536).decode("utf-8", "replace")
    except OSError:  # EIO: the last process that had the terminal open has ended
        return ""


def _plain_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("REPERTORY_")}
    return {**kept, "TERM": "xterm", "COLUMNS": "", "LINES": "", "NO_COLOR": "", "PYTHONIOENCODING": "utf-8"}
