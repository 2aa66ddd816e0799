"""Measures the engine alone: output tokens per second beside vLLM's, and the share of the physical floor.

    python -m bench.engine [--lines 8B/bf16,8B/nf4,8B/fp8,1B/bf16,8B/int8] [--workloads 1/256/128,…] [--folder /tmp/checkpoints]
    python -m bench.engine --tensor-parallel 2 --lines 8B/bf16,70B/nf4                                   on two GPUs

N requests with random token ids are submitted at once, greedy, EOS ignored; the figure is the median of --repeats runs after one warm-up (and after
idle time in which CUDA graphs are captured). The weights are random.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench import limits
from bench.checkpoints import SHAPES, Shape, write
from bench.packed import checkpoint_of, random_packed
from runtime.types import Checkpoint
from tests.support.engine_process import Engine, engine

# vLLM 0.22.1 on the same machine and workloads (docs/benchmarks/README.md), output tokens per second
VLLM = {
    "8B/bf16": {"1/256/128": 198, "8/256/128": 1456, "32/256/128": 4569, "128/256/128": 9396, "256/256/128": 10897, "64/16/512": 10474,
                "256/16/512": 22350, "512/1024/256": 6208},
    "8B/nf4": {"1/256/128": 178, "8/256/128": 630, "32/256/128": 2199, "128/256/128": 5443, "256/256/128": 7458},
    "8B/fp8": {"1/256/128": 281, "8/256/128": 2072, "32/256/128": 5833, "128/256/128": 12965, "256/256/128": 14839, "256/16/512": 27381},
    "1B/bf16": {"1/256/128": 776, "8/256/128": 4666, "32/256/128": 14729, "128/256/128": 30897, "256/256/128": 37414, "512/1024/256": 29356},
}  # fmt: skip
# the same with --tensor-parallel 2 on two GPUs
VLLM_TWO_GPUS = {
    "8B/bf16": {"1/256/128": 281, "256/256/128": 17447},
    "70B/bf16": {"1/256/128": 47, "32/256/128": 1087, "128/256/128": 2218},
}
# targets
ASKED = {
    "8B/bf16": {"1/256/128": 240, "8/256/128": 1800, "32/256/128": 5500, "128/256/128": 11000, "256/256/128": 13000, "64/16/512": 12500,
                "256/16/512": 26500, "512/1024/256": 6800},
    "8B/nf4": {"1/256/128": 450, "8/256/128": 3000, "32/256/128": 6500, "128/256/128": 11000, "256/256/128": 12500},
    "8B/fp8": {"1/256/128": 400, "8/256/128": 2900, "32/256/128": 8000, "128/256/128": 15500, "256/256/128": 17000, "256/16/512": 31000},
    "1B/bf16": {"1/256/128": 1000, "8/256/128": 6500, "32/256/128": 18000, "128/256/128": 38000, "256/256/128": 46000, "512/1024/256": 35000},
}  # fmt: skip
ASKED_TWO_GPUS = {
    "8B/bf16": {"1/256/128": 380, "256/256/128": 20000},
    "70B/bf16": {"1/256/128": 54, "32/256/128": 1500, "128/256/128": 3200},
    "70B/nf4": {"1/256/128": 95},
    "70B/fp8": {"1/256/128": 95},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", default="8B/bf16,8B/nf4,1B/bf16")
    parser.add_argument("--workloads", default="", help="comma separated N/input/output; default: all of the line")
    parser.add_argument("--skip", default="", help="comma separated workloads to leave out")
    parser.add_argument(
        "--once", default="", help="comma separated workloads that run a single time, without a warm-up"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--idle", type=float, default=1.0, help="seconds between warm-up and measurement")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/repertory-checkpoints"))
    parser.add_argument("--log", type=Path, default=None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--packer", action="store_true", help="quantise with the packer instead of drawing random codes"
    )
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs that share each model")
    parser.add_argument("--budget-gib", type=float, default=0.0)
    parser.add_argument(
        "--host-gib", type=float, default=24.0, help="host arena: its registration ends within the warm-up"
    )
    args = parser.parse_args()
    lines = args.lines.split(",")
    wanted = [text for text in args.workloads.split(",") if text]
    paths = {line: prepared(line, args.folder, args.packer) for line in lines}
    config = {
        "device": args.device,
        "max_rows": 512,
        "tensor_parallel": args.tensor_parallel,
        "device_budget_bytes": int(args.budget_gib * 2**30),
        "host_budget_bytes": int(args.host_gib * 2**30),
    }
    with engine(config, log=args.log) as running:
        print(
            f"{running.hello.device_name}: ready after {running.ready_s:.1f} s, {running.hello.device_budget_bytes / 2**30:.0f} GiB for models"
        )
        for line in lines:
            name, format_ = line.split("/")
            loaded, took = running.load(line, paths[line])
            print(f"\n{line}: loaded in {took:.2f} s; {loaded.facts.path}")
            print(
                f"{'N/in/out':>13} {'tok/s':>8} {'vLLM':>8} {'x':>5} {'asked':>8} {'met':>4} {'floor':>6} {'TTFT p50':>9} {'gap p50':>8} {'gap p99':>8}"
            )
            asked = ASKED if args.tensor_parallel == 1 else ASKED_TWO_GPUS
            for workload in wanted or asked.get(line, ASKED["8B/nf4"]):
                if workload in args.skip.split(","):
                    continue
                measure(
                    running,
                    line,
                    SHAPES[name],
                    format_,
                    workload,
                    0 if workload in args.once.split(",") else args.repeats,
                    args.idle,
                    args.tensor_parallel,
                )
            running.unload(line)


def prepared(line: str, folder: Path, packer: bool = False) -> Checkpoint:
    """Return the checkpoint of a line such as `8B/nf4`, written below `folder` unless it exists."""
    name, format_ = line.split("/")
    if format_ in limits.BODY_BYTES_PER_PARAMETER and format_ != "bf16" and not packer:
        return random_packed(SHAPES[name], format_, folder)
    return checkpoint_of(write(SHAPES[name], folder / name), format_, folder)


def measure(
    running: Engine,
    line: str,
    shape: Shape,
    format_: str,
    workload: str,
    repeats: int,
    idle_s: float,
    num_gpus: int = 1,
) -> None:
    rows, input_tokens, output_tokens = (int(part) for part in workload.split("/"))
    rng = np.random.default_rng(rows * 7919 + input_tokens)

    def prompts() -> list[tuple[str, "np.ndarray[Any, np.dtype[np.int32]]"]]:
        return [(line, rng.integers(100, shape.vocab, input_tokens, dtype=np.int32)) for _ in range(rows)]

    runs = [running.generate(prompts(), output_tokens)]
    running.wait_idle(idle_s)
    for repeat in range(repeats):
        if not repeat:
            runs.clear()  # the warm-up
        runs.append(running.generate(prompts(), output_tokens))
        time.sleep(0.05)
    rate = statistics.median(run.tokens_per_s for run in runs)
    middle = min(runs, key=lambda run: abs(run.tokens_per_s - rate))
    floor = rows * output_tokens / limits.workload_s(shape, format_, rows, input_tokens, output_tokens, num_gpus)
    peers, targets = (VLLM, ASKED) if num_gpus == 1 else (VLLM_TWO_GPUS, ASKED_TWO_GPUS)
    peer, asked = peers.get(line, {}).get(workload), targets.get(line, {}).get(workload)
    gaps = sorted(middle.gaps_s) or [float("nan")]
    first = statistics.median(middle.first_s.values())
    print(
        f"{workload:>13} {rate:>8.0f} {peer or '':>8} {f'{rate / peer:.2f}' if peer else '':>5} {asked or '':>8} "
        f"{('yes' if rate >= asked else 'no') if asked else '':>4} {rate / floor:>6.0%} {first * 1e3:>7.1f}ms "
        f"{gaps[len(gaps) // 2] * 1e3:>6.2f}ms {gaps[int(len(gaps) * 0.99)] * 1e3:>6.2f}ms",
        flush=True,
    )


if __name__ == "__main__":
    main()
