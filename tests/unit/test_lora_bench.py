"""The benchmark of LoRA adapters: its traffic, its floor, and that it runs on any machine."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.checkpoints import LLAMA_8B
from bench.lora import floor_s
from bench.lora_residency import Traffic, arrivals


def test_arrivals_follow_the_power_law_and_the_rate() -> None:
    traffic = Traffic(registered=200, resident=64, rate=50, seconds=200)
    drawn = arrivals(traffic)
    assert [each.at_s for each in drawn] == sorted(each.at_s for each in drawn)
    assert drawn[-1].at_s == pytest.approx(200, rel=0.05)
    counts = [sum(each.adapter == number for each in drawn) for number in (0, 1, 3)]
    assert counts[0] / counts[1] == pytest.approx(2, rel=0.15)
    assert counts[0] / counts[2] == pytest.approx(4, rel=0.2)
    assert drawn == arrivals(traffic)


def test_floor_grows_with_the_bytes_of_distinct_adapters() -> None:
    base, one, many = (floor_s(LLAMA_8B, "bf16", 32, count, 16) for count in (0, 1, 32))
    step_s = 84e6 / 4.2e12  # 42 million values of two bytes
    assert many - one == pytest.approx(31 * 127 * step_s, rel=0.01)
    assert 0 < one - base < 0.02


def test_bench_prints_the_table_and_the_residency(tmp_path: Path) -> None:
    sizes = ["--budget-gib", "0.5", "--host-gib", "0.25", "--folder", str(tmp_path)]
    traffic = ["--residency", "--registered", "4", "--resident", "2", "--rate", "10", "--seconds", "1"]
    command = [sys.executable, "-m", "bench.lora", "--device", "cpu", "--lines", "tiny/bf16", "--repeats", "1"]
    done = subprocess.run(
        [*command, "--cases", "1/0,2/2", *sizes, *traffic], capture_output=True, text=True, check=False
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[:2] for line in lines if line and line[0] in "12"] == [["1", "base"], ["2", "2"], ["2", "2"]], (
        done.stderr
    )
    assert lines[-1][:2] == ["p99", "is"]
    assert done.returncode == (0 if lines[-1][-1] == "yes" else 1)
