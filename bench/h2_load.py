"""Runs nghttp2's compiled programs as gRPC client (h2load) and gRPC server (nghttpd), which cost less than what they measure.

nghttpd answers each method with a file of framed messages and `grpc-status: 0` as trailer. h2load does not read trailers. A gRPC error has no message,
so calls that failed are found by the bytes of messages that are missing.
"""

import contextlib
import re
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.load import quantile
from tests.support.stack import free_port

_WINDOW_BITS = 24
_MAX_STREAMS = 100_000
_START_S = 5.0
_PACKAGES = "the Debian packages nghttp2-client and nghttp2-server have them"


@dataclass(frozen=True, slots=True)
class Run:
    """What one h2load counted. `failed`: calls without all bytes of their answer."""

    calls: int
    failed: int
    calls_per_s: float
    p50_s: float
    p99_s: float


def frame(message: bytes) -> bytes:
    """Return a message as gRPC frames it, not compressed."""
    return struct.pack(">?I", False, len(message)) + message


def check_installed() -> None:
    """Raise RuntimeError if a program is missing."""
    missing = [name for name in ("h2load", "nghttpd") if shutil.which(name) is None]
    if missing:
        raise RuntimeError(f"{' and '.join(missing)} not found; {_PACKAGES}")


@contextlib.contextmanager
def serve(answers: Mapping[str, bytes]) -> Iterator[str]:
    """Serve framed answers by method, `package.Service/Method`, whatever the request. Yields the address."""
    port = free_port()
    with contextlib.ExitStack() as parts:
        root = Path(parts.enter_context(tempfile.TemporaryDirectory(prefix="repertory-h2-")))
        for method, content in answers.items():
            (root / method).parent.mkdir(exist_ok=True)
            (root / method).write_bytes(content)
        process = subprocess.Popen(
            [
                *("nghttpd", "--no-tls", "--address=127.0.0.1", f"--htdocs={root}", "--no-content-length"),
                *("--trailer=grpc-status: 0", f"--max-concurrent-streams={_MAX_STREAMS}"),
                *(f"--window-bits={_WINDOW_BITS}", f"--connection-window-bits={_WINDOW_BITS}", str(port)),
            ],
            stdout=subprocess.DEVNULL,
        )
        parts.callback(process.wait)
        parts.callback(process.terminate)
        yield f"127.0.0.1:{port}"


class Load:
    """Sends one request again and again. `answer_bytes`: of a complete answer, without its headers."""

    def __init__(
        self, path: str, headers: Mapping[str, str], body: bytes, answer_bytes: int, *, http1: bool = False
    ) -> None:
        self._path = path
        self._headers = headers
        self._body = body
        self._answer_bytes = answer_bytes
        self._http1 = http1

    def for_seconds(self, address: str, clients: int, seconds: float) -> Run:
        """Call for a time, with one connection and one call at a time for each client."""
        return self._run(address, clients, f"--duration={round(seconds * 1000)}ms")

    def calls(self, address: str, clients: int, num_calls: int) -> Run:
        """Make a number of calls."""
        return self._run(address, clients, f"--requests={num_calls}")

    def _run(self, address: str, clients: int, *extent: str) -> Run:
        with tempfile.TemporaryDirectory(prefix="repertory-h2-") as folder:
            log, body = Path(folder, "log"), Path(folder, "request")
            body.write_bytes(self._body)
            protocol = ("--h1",) if self._http1 else ("--max-concurrent-streams=1", f"--window-bits={_WINDOW_BITS}")
            done = subprocess.run(
                [
                    *("h2load", *extent, f"--clients={clients}", "--threads=1", *protocol),
                    *(f"--data={body}", f"--log-file={log}"),
                    *(f"--header={name}: {value}" for name, value in self._headers.items()),
                    f"http://{address}{self._path}",
                ],
                check=True,
                capture_output=True,
                text=True,
            )
            took_s = [int(line.split("\t")[2]) / 1e6 for line in log.read_text().splitlines()]
        return _report(done.stdout, took_s, self._answer_bytes)


def grpc_load(method: str, model_id: str, request: bytes, answer_bytes: int) -> Load:
    """Return calls of a method, `package.Service/Method`, by one model id. `answer_bytes` include the frames."""
    headers = {"content-type": "application/grpc", "te": "trailers", "mm-model-id": model_id}
    return Load(f"/{method}", headers, frame(request), answer_bytes)


def _report(text: str, took_s: list[float], answer_bytes: int) -> Run:
    """Read h2load's report. With a duration, it also counts bytes of calls that it did not see end, so failures may be missed by its clients' number."""
    calls = _number(r"requests: (\d+) total", text)
    data_bytes = _number(r"\((\d+)\) data", text)
    complete = min(_number(r"(\d+) succeeded", text), data_bytes // answer_bytes)
    return Run(
        calls,
        calls - complete,
        calls / _seconds(text),
        quantile(took_s, 0.5),
        quantile(took_s, 0.99),
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"h2load's report has no {pattern}:\n{text}")
    return int(found[1])


def _seconds(text: str) -> float:
    found = re.search(r"finished in ([\d.]+)(us|ms|s)", text)
    if found is None:
        raise RuntimeError(f"h2load's report has no time:\n{text}")
    return float(found[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[found[2]]


def wait_until_answering(load: Load, address: str) -> None:
    """Return once a call succeeds. Raises RuntimeError after 5 s."""
    give_up_s = time.monotonic() + _START_S
    while True:
        with contextlib.suppress(subprocess.CalledProcessError, RuntimeError):
            if not load.calls(address, 1, 1).failed:
                return
        if time.monotonic() > give_up_s:
            raise RuntimeError(f"{address} answers no call after {_START_S:g} s")
        time.sleep(0.05)
