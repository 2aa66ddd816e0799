"""Benchmarks still run against today's mesh, runtime and engine. Their figures are not checked."""

import subprocess
import sys
from pathlib import Path


def test_front_prints_one_row_per_repeat() -> None:
    command = [sys.executable, "-m", "bench.front", "--streams", "2", "--output", "3", "--repeats", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["mesh", "mesh"]


def test_trace_runs_on_an_engine_process(tmp_path: Path) -> None:
    """Six tiny models on room for a few: the engine and its simulation answer all requests, and models are swapped."""
    command = [
        sys.executable, "-m", "bench.trace", "--device", "cpu", "--kinds", "tiny/bf16", "--models", "6", "--lines", "0.5/1/6",
        "--seconds", "3", "--length-share", "0.02", "--device-gib", "0.02", "--warm-gap-s", "0.2", "--folder", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:2] == "| "]
    split = next(place for place, row in enumerate(rows) if row[2] == "copied")
    first_tokens, memory = ({row[1]: row for row in part} for part in (rows[:split], rows[split:]))
    assert set(first_tokens) == {"policy", "---", "engine", "engine, simulated", "one vLLM that sleeps"}
    assert first_tokens["engine"][-1] == "0"
    assert int(memory["engine"][5].rstrip("%")) < 100, "nothing was copied"
    assert "models with a failed request: none" in done.stdout


def test_neighbour_is_measured_beside_swaps(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "bench.swap", "--device", "cpu", "--lines", "tiny/bf16", "--neighbour", "2", "--output", "8",
        "--repeats", "1", "--folder", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    cells = [cell.strip() for cell in done.stdout.splitlines()[2].split("|")]
    assert cells[1:3] == ["tiny/bf16", "2"]
    assert float(cells[8]) > 0, "nothing was swapped in"
