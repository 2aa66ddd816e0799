"""A pod whose network is cut, in network namespaces: packets vanish and no connection is closed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.pod_network import may_make_namespaces


@pytest.mark.skipif(not may_make_namespaces(), reason="network namespaces cannot be made here")
def test_partition_costs_a_call_seconds_and_the_lost_pod_its_readiness(tmp_path: Path) -> None:
    command = ["unshare", "-rn", sys.executable, "-m", "tests.support.partition", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert (found["first"], found["answer"]) == ("hi", "hi")
    assert found["answered_s"] < 8
    assert found["lost_readiness_s"] < 20, "a pod without its session must not stay ready"
    assert found["ready_s"] < 20
