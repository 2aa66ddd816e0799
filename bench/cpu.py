"""Compares Repertory, streamed through mesh and runtime, with transformers `generate`: SmolLM2 in fp32 on a CPU, in turns.

    python -m bench.cpu [--rows 1,4,16,32] [--repeats 3]

Prints tokens per second and their ratio. On shared machines only the ratios are meaningful.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
from pathlib import Path

from bench import load
from tests.support import stack
from tests.support.smollm2 import gguf_path

INPUT_TOKENS, OUTPUT_TOKENS = 64, 128
# Limit of rows × repeats. Larger counts run longer and need fewer repeats.
MOST_ROWS = 64
# vLLM's CPU build on two cores of another machine, from docs/benchmarks: an indication only.
VLLM_CPU = {1: 19.6, 4: 55.5, 16: 128.1, 32: 160.4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,4,16,32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--log", type=Path, default=None, help="file for the servers' output")
    args = parser.parse_args()
    rows = [int(text) for text in args.rows.split(",")]
    with stack.serve("--device", "cpu", "--memory", "3GiB", log=args.log) as served:
        took = stack.load_and_wait(served, "smol", f"file://{gguf_path()}", max_model_len=2048)
        print(
            f"ready to take loads in {served.ready_s:.1f} s; first load, unpacking included, {took:.1f} s", flush=True
        )
        peer = _Peer(served)
        print(
            f"{'rows':>5} {'transformers':>13} {'repertory':>10} {'ratio':>6} {'TTFT p50':>9} {'gap p50':>8} {'gap p99':>8} {'vLLM CPU*':>10}"
        )
        for count in rows:
            ours: list[load.Outcome] = []
            theirs: list[float] = []
            for repeat in range(max(1, min(args.repeats, MOST_ROWS // count))):
                theirs.append(peer.run(count, seed=repeat))
                workload = load.Workload(count, INPUT_TOKENS, OUTPUT_TOKENS, vocab_size=49152, seed=repeat)
                ours.append(asyncio.run(load.run(served.url, "smol", workload)))
            best = sorted(ours, key=lambda outcome: outcome.tokens_per_s)[(len(ours) - 1) // 2]
            other = statistics.median(theirs)
            print(
                f"{count:>5} {other:>13.1f} {best.tokens_per_s:>10.1f} {best.tokens_per_s / other:>6.2f} {best.ttft_p50_s * 1e3:>7.0f}ms "
                f"{best.gap_p50_s * 1e3:>6.0f}ms {best.gap_p99_s * 1e3:>6.0f}ms {VLLM_CPU.get(count, float('nan')):>10.1f}",
                flush=True,
            )
        peer.close()
    print("* measured in another run on two similar cores")


class _Peer:
    """transformers in its own process, idle while Repertory runs, over the same weights in fp32."""

    def __init__(self, served: stack.Stack) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.hf_peer", str(gguf_path())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        ready = self._process.stdout.readline()
        if ready.strip() != "ready":
            raise RuntimeError(f"the transformers peer did not start: {ready!r}")

    def run(self, rows: int, seed: int) -> float:
        """Return output tokens per second."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {"rows": rows, "input_tokens": INPUT_TOKENS, "output_tokens": OUTPUT_TOKENS, "seed": seed}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


if __name__ == "__main__":
    main()
