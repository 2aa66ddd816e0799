"""Asks the engine's support check whether it can run a configuration, and caches the answers.

Each check takes a process with torch some seconds.
"""

import hashlib
import json
import logging
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from cachetools import LRUCache

from common.parent import child_environment
from runtime.puller.progress import PullJob

log = logging.getLogger(__name__)

_POLL_S = 0.05
_REMEMBERED = 256
# The engine ignores them, and the configuration of a packed directory lacks them.
_LEFT_OUT = ("quantization_config", "_name_or_path", "auto_map")

Ask = Callable[[Path, int | None, PullJob], str | None]
"""Returns the reason against a folder's config.json, empty for none, or None if the check failed."""


class SupportProbe:
    """Safe to use from several threads. Runs one check at a time, so that only one such process takes memory."""

    def __init__(self, ask: Ask | None = None) -> None:
        """`ask` runs one check; None = a process of the engine's support check."""
        self._ask = ask or _ask
        self._answers: LRUCache[bytes, str] = LRUCache(_REMEMBERED)
        self._lock = threading.Lock()

    def refusal(self, config: Mapping[str, object], max_model_len: int | None, job: PullJob) -> str:
        """Return why the engine cannot run it; empty if it can or if the check fails."""
        kept = {name: value for name, value in config.items() if name not in _LEFT_OUT}
        key = hashlib.blake2b(json.dumps([kept, max_model_len], sort_keys=True, default=str).encode()).digest()
        with self._lock:
            known = self._answers.get(key)
            if known is not None:
                return known
            with tempfile.TemporaryDirectory(prefix="repertory-judge-") as folder:
                (Path(folder) / "config.json").write_text(json.dumps(kept, default=str), encoding="utf-8")
                reason = self._ask(Path(folder), max_model_len, job)
            if reason is None:
                return ""
            self._answers[key] = reason
            return reason


def _ask(path: Path, max_model_len: int | None, job: PullJob) -> str | None:
    command = [
        sys.executable,
        "-m",
        "runtime.engine.support_check",
        str(path),
        *([str(max_model_len)] if max_model_len is not None else []),
    ]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=child_environment(),
    )
    try:
        while process.poll() is None:
            job.wait(_POLL_S)
        assert process.stdout is not None
        words = process.stdout.read()
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    try:
        return str(json.loads(words))
    except ValueError:
        log.warning(
            "the support check ended with status %d without an answer; the load will show whether the model can run",
            process.returncode,
        )
        return None
