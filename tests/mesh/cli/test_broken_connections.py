"""Verbs whose server answers with something else or breaks off, and whose output cannot be written."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.command_line import Say
from tests.support.pods import RunningPod


@contextmanager
def answering(*answers: bytes) -> Iterator[str]:
    """A server that gives each connection the next of these, and hangs up."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for answer in answers:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)  # there may be no client, if a test fails
    thread.start()
    with listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


EVENT = b'data: {"choices":[{"delta":{"content":"half an ans"}}]}\n\n'


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


MODEL = b'HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n{"name":"m"}'


async def test_ps_reports_an_answer_that_is_not_repertorys(say: Say) -> None:
    with answering(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n<br>") as server:
        status, _, error = await say("ps", "--server", server)
    assert (status, error) == (1, f"repertory: what answers at {server} is not Repertory: its answer cannot be read\n")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"\x00\x00\x12\x04gRPC\r\n\r\n", "does not speak HTTP"),
        (STREAM + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(EVENT), EVENT), "broke off"),
        (STREAM + b"\r\n" + EVENT, "broke off"),
    ],
)
async def test_run_reports_a_stream_that_breaks_off(answer: bytes, words: str, say: Say) -> None:
    with answering(MODEL, answer) as server:
        status, told, error = await say("run", "m", "hello", "--server", server)
    assert status == 1
    assert words in error
    assert told in ("", "half an ans\n")
    assert "Traceback" not in error


async def test_ps_reports_an_answer_that_breaks_off(say: Say) -> None:
    with answering(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{") as server:
        status, _, error = await say("ps", "--server", server)
    assert status == 1
    assert "broke off" in error


async def test_list_reports_an_output_that_cannot_be_written(pod: RunningPod) -> None:
    """A full disk is one line, a reader that has gone none; a terminal without Unicode gets what it can show."""
    # as people have it: what is buffered is written, and fails, at the end
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}

    async def ps(stdout: int, **environment: str) -> tuple[int | None, str, str]:
        command = [sys.executable, "-m", "mesh", "list"]
        listing = await asyncio.create_subprocess_exec(
            *command,
            stdout=stdout,
            stderr=subprocess.PIPE,
            env=buffered | {"REPERTORY_SERVER": f"http://127.0.0.1:{pod.pod.http.port}"} | environment,
        )
        told, error = await listing.communicate()
        return listing.returncode, (told or b"").decode("ascii", "strict"), error.decode()

    await pod.name("naïve", "/n")
    full = os.open("/dev/full", os.O_WRONLY)
    status, _, error = await ps(full)
    os.close(full)
    assert status == 1
    assert error == "repertory: [Errno 28] No space left on device\n"
    reader, writer = os.pipe()
    os.close(reader)
    status, _, error = await ps(writer)
    os.close(writer)
    assert status in (1, 141)  # rich's choice, and ours
    assert error == ""
    status, told, error = await ps(subprocess.PIPE, PYTHONIOENCODING="ascii")
    assert (status, error) == (0, "")
    assert "na?ve" in told
