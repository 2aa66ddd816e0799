"""A rank that dies or hangs ends all ranks of its engine, with the reason, within five seconds."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from runtime.config.schema import EngineConfig
from runtime.engine.ranks.followers import Followers, RankLost
from runtime.errors import LoadFailed
from tests.model.parallel.test_tensor_parallel import config
from tests.support.engine_process import engine


def _rank(engine_pid: int) -> psutil.Process:
    [child] = [one for one in psutil.Process(engine_pid).children() if "runtime.engine.ranks" in one.cmdline()]
    return child


@pytest.mark.parametrize(
    ("sent", "reason"), [(signal.SIGKILL, "was ended by SIGKILL"), (signal.SIGSTOP, "has not answered for 4 s")]
)
def test_lost_rank_ends_the_engine_with_the_reason(sent: signal.Signals, reason: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with engine(config(2), log) as running:
        rank = _rank(running.hello.pid)
        leader = psutil.Process(running.hello.pid)
        rank.send_signal(sent)
        began = time.monotonic()
        psutil.wait_procs([leader], timeout=20)
        assert time.monotonic() - began < 6
        psutil.wait_procs([rank], timeout=5)
        assert not rank.is_running()
    assert f"rank 1 (pid {rank.pid}) {reason}" in log.read_text()


def test_ranks_end_with_their_leader() -> None:
    with engine(config(2)) as running:
        rank = _rank(running.hello.pid)
        os.kill(running.hello.pid, signal.SIGKILL)
        psutil.wait_procs([rank], timeout=10)
        assert not rank.is_running()


def test_rank_that_lives_and_does_not_finish_is_lost() -> None:
    lost: list[RankLost] = []
    followers = Followers(EngineConfig(device="cpu", tensor_parallel=2), lost.append, settle_s=0.1)
    try:
        error = followers.settle("m")  # no load was begun, so none ends
        assert isinstance(error, LoadFailed)
        assert error.message.endswith("has not finished within 0.1 s")
        assert [f"model m: {each}" for each in lost] == [error.message]
    finally:
        followers.kill()
        followers.close()
