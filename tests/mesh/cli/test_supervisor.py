"""Supervision of a process: restarts after an exit and a hang, and patience while it starts."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from common.exit_status import CANNOT_START, USAGE
from mesh.cli import leftovers
from mesh.cli.supervised_process import SupervisedProcess, answers
from mesh.cli.supervisor import Supervisor
from tests.support.etcd import free_port
from tests.support.waiting import until

# Records its start, drops connections until the file "open" exists, then answers, and stops itself once "hang" exists. Counts both.
SCRIPT = """
import http.server, os, signal, sys, threading, time
from pathlib import Path
folder = Path(sys.argv[1])
(folder / f"started-{os.getpid()}").touch()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503)
        self.end_headers()
        (folder / f"answer-{time.monotonic_ns()}").touch()
    def log_message(self, *args): ...
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Handler)
server.socket.settimeout(0.01)
while not (folder / "open").exists():
    try:
        server.socket.accept()[0].close()
        (folder / f"dropped-{time.monotonic_ns()}").touch()
    except TimeoutError:
        pass
server.socket.settimeout(None)
threading.Thread(target=server.serve_forever, daemon=True).start()
while not (folder / "hang").exists():
    time.sleep(0.01)
(folder / "hang").unlink()
os.kill(os.getpid(), signal.SIGSTOP)
"""


async def test_supervised_process_restarts_after_a_hang(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    address = f"127.0.0.1:{port}"
    child = SupervisedProcess(
        "test",
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(port)],
        address,
        probe_interval_s=0.2,
        max_failed_probes=4,
    )
    stopping = asyncio.Event()
    running = asyncio.create_task(child.run(stopping))

    def starts() -> int:
        return len(list(tmp_path.glob("started-*")))

    try:
        await until(lambda: len(list(tmp_path.glob("dropped-*"))) >= 6)
        assert starts() == 1, "a process that is still starting was killed"
        (tmp_path / "open").touch()
        await until(lambda: len(list(tmp_path.glob("answer-*"))) >= 2)
        (tmp_path / "hang").touch()
        await until(lambda: starts() == 2)
        async with asyncio.timeout(10):
            while not await answers(address, 1.0):
                await asyncio.sleep(0.02)
    finally:
        stopping.set()
        await child.stop(5.0)
        assert await running == 0
    assert "the test process hangs" in caplog.text


async def test_answers_is_false_for_a_silent_socket(tmp_path: Path) -> None:
    path = tmp_path / "mute.sock"
    done = asyncio.Event()

    async def mute(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await done.wait()
        writer.close()

    server = await asyncio.start_unix_server(mute, path)
    assert not await answers(f"unix:{path}", 0.1)
    assert not await answers(f"unix:{tmp_path}/absent.sock", 0.1)
    done.set()
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize("status", [USAGE, CANNOT_START])
async def test_supervised_process_is_not_restarted_if_that_cannot_help(tmp_path: Path, status: int) -> None:
    script = f"import os, sys; open(sys.argv[1] + f'/{{os.getpid()}}', 'w').close(); sys.exit({status})"
    assert await SupervisedProcess("test", [sys.executable, "-c", script, str(tmp_path)]).run(asyncio.Event()) == status
    assert len(list(tmp_path.iterdir())) == 1


# Starts a supervised process that ignores SIGTERM, and prints its id.
SUPERVISOR = """
import asyncio, sys
from mesh.cli.supervisor import SupervisedProcess
child = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(600)"
asyncio.run(SupervisedProcess("test", [sys.executable, "-c", child]).run(asyncio.Event()))
"""


def test_supervised_process_ends_with_a_killed_supervisor() -> None:
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISOR], stdout=subprocess.PIPE)
    assert supervisor.stdout is not None
    try:
        child = psutil.Process(int(supervisor.stdout.readline()))
    finally:
        supervisor.kill()
        supervisor.wait()
        supervisor.stdout.close()
    child.wait(10)
    assert not child.is_running()


def test_leftovers_ends_the_recorded_process_only(tmp_path: Path) -> None:
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    left, other = subprocess.Popen(sleeper), subprocess.Popen(sleeper)
    try:
        leftovers.record(tmp_path / "mesh.pid", left.pid)
        (tmp_path / "runtime.pid").write_text(f"{other.pid} 1.0")  # an id that was given again
        ended = [leftovers.end_recorded(tmp_path / name) for name in ("mesh.pid", "runtime.pid", "none.pid")]
        assert ended == [True, False, False]
        assert not psutil.pid_exists(left.pid)
        assert other.poll() is None
    finally:
        for process in (left, other):
            process.kill()
            process.wait()


async def test_supervised_process_is_restarted_only_if_it_has_run(tmp_path: Path) -> None:
    def process(code: str) -> SupervisedProcess:
        return SupervisedProcess("test", [sys.executable, "-c", code, str(tmp_path)], backoff_s=(0.01,))

    refuses = "import os, sys; open(sys.argv[1] + f'/{os.getpid()}', 'w').close(); sys.exit(1)"
    assert await process(refuses).run(asyncio.Event()) == 1
    assert len(list(tmp_path.iterdir())) == 2
    # killed in its first run, it cannot start a few times, as if its store were away
    script = (
        "import os, signal, sys; from pathlib import Path; runs = Path(sys.argv[1]) / 'runs'; number = len(runs.read_bytes()) if runs.exists() else 0;"
        "runs.write_bytes(bytes(number + 1)); os.kill(os.getpid(), signal.SIGKILL) if not number else sys.exit(1)"
    )
    stopping = asyncio.Event()
    running = asyncio.create_task(process(script).run(stopping))
    await until(lambda: (tmp_path / "runs").exists() and len((tmp_path / "runs").read_bytes()) >= 5)
    stopping.set()
    assert await running == 0


async def test_supervisor_kills_processes_on_a_second_signal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first signal starts the grace period, and the second ends it."""
    stubborn = f"import pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); pathlib.Path({str(tmp_path)!r}, 'NAME').touch(); time.sleep(600)"
    runtime, mesh = (
        SupervisedProcess(name, [sys.executable, "-c", stubborn.replace("NAME", name)]) for name in ("runtime", "mesh")
    )
    caplog.set_level("INFO")
    supervisor = Supervisor(mesh, runtime, grace_s=600.0, announce=asyncio.Event().wait)
    running = asyncio.create_task(supervisor.run())
    await until(lambda: (tmp_path / "mesh").exists() and (tmp_path / "runtime").exists())
    os.kill(os.getpid(), signal.SIGTERM)
    await until(lambda: "running requests have 600 s to finish" in caplog.text)
    assert not running.done()
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(60):
        assert await running == 0


async def test_supervised_process_gets_only_the_variables_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPERTORY_STORE", "read by serve")
    script = (
        "import os, sys; open(sys.argv[1], 'w').write(' '.join(n for n in os.environ if n[:4] == 'REPE')); sys.exit(2)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "names")]
    await SupervisedProcess("test", command, environment={"REPERTORY_MAX_ROWS": "3"}).run(asyncio.Event())
    assert (tmp_path / "names").read_text() == "REPERTORY_MAX_ROWS"


async def test_supervisor_passes_sighup_to_the_mesh(tmp_path: Path) -> None:
    script = (
        "import pathlib, signal, sys, time; folder = pathlib.Path(sys.argv[1]);"
        "signal.signal(signal.SIGHUP, lambda *_: (folder / 'again').touch());"
        "(folder / 'up').touch(); [time.sleep(0.05) for _ in iter(int, 1)]"
    )
    mesh = SupervisedProcess("mesh", [sys.executable, "-c", script, str(tmp_path)])
    runtime = SupervisedProcess("runtime", [sys.executable, "-c", "import time; time.sleep(600)"])
    supervisor = Supervisor(mesh, runtime, grace_s=1.0, announce=asyncio.Event().wait, gets_sighup=mesh)
    running = asyncio.create_task(supervisor.run())
    await until(lambda: (tmp_path / "up").exists())
    os.kill(os.getpid(), signal.SIGHUP)
    await until(lambda: (tmp_path / "again").exists())
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(60):
        assert await running == 0
