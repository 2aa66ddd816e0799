"""Benchmarks of the served path still run against today's mesh and runtime. Their figures are not checked."""

import subprocess
import sys


def test_front_prints_one_row_per_repeat() -> None:
    command = [sys.executable, "-m", "bench.front", "--streams", "2", "--output", "3", "--repeats", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["mesh", "mesh"]
