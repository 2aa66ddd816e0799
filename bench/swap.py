"""Switching models: two models under a device budget that holds one, each called in turn, from the request to its first token.

    python -m bench.swap [--lines 8B/bf16,8B/nf4,1B/bf16] [--switches 24] [--prompt 64] [--folder /tmp/repertory-checkpoints]
    python -m bench.swap --returning-conversation 4000 [--lines …] [--switches 24]
    python -m bench.swap --neighbour 16 [--lines …] [--output 1024]

Both models wait in host memory, so a switch copies one model's weights over the link. The table shows the median and the longest time to the first
token, the floor (weight bytes over the link's measured bandwidth), and vLLM's switch (sleep one engine, wake the other, first token). Each model must
give the same tokens after every return; the command fails otherwise.

With `--returning-conversation N` each model is called with a conversation of N ids whose KV it has computed before, and which has left the device
with it. The table shows the time to the first token with KV kept in host memory and with `--host-kv 0`, which computes it again, beside the limit: 1.3 times
the bytes of weights and KV over the link's bandwidth. The engine copies KV back only where that is faster than computing; "copied back" says how much.

With `--neighbour ROWS` a third model decodes that many rows, alone and while the two others are swapped in without a pause (bench/swap_neighbour.py). The
command fails if its tokens per second fall by more than 15 %; on a CPU nothing is asked.
"""

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.checkpoints import SHAPES, Shape, write
from bench.limits import HOST_TO_DEVICE_BYTES_PER_S
from bench.packed import checkpoint_of
from bench.swap_neighbour import HEADER, MOST_LOSS, measure_neighbour
from runtime.config.schema import EngineConfig
from runtime.types import Checkpoint
from tests.support.engine_process import Engine, Prompts, engine

VLLM_SWITCH_S = {"8B/bf16": 1.15, "8B/nf4": 0.82, "1B/bf16": 0.72}
_SLAB_BYTES = 64 << 20
_CPU_SLAB_BYTES = 1 << 20
_KV_BYTES = 1 << 30  # for the rows of the one resident model


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the table; seconds and bytes."""

    name: str
    weight_bytes: int
    switch_s: list[float]
    resident_s: float

    @property
    def floor_s(self) -> float:
        return self.weight_bytes / HOST_TO_DEVICE_BYTES_PER_S


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", default="8B/bf16,8B/nf4,1B/bf16", help="shape/format, comma separated")
    parser.add_argument("--switches", type=int, default=24)
    parser.add_argument("--prompt", type=int, default=64, help="token ids in each prompt")
    parser.add_argument(
        "--returning-conversation", type=int, default=0, metavar="N", help="token ids of each conversation"
    )
    parser.add_argument("--neighbour", type=int, default=0, metavar="ROWS", help="rows that decode beside swaps")
    parser.add_argument("--output", type=int, default=1024, help="tokens that each row of --neighbour decodes")
    parser.add_argument("--repeats", type=int, default=2, help="of --neighbour")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/repertory-checkpoints"))
    args = parser.parse_args()
    if args.returning_conversation:
        print(
            "| model | tokens | return p50 | longest | copied back | limit | computed again p50 | longest | resident |"
        )
        print("| --- | --: | --: | --: | --: | --: | --: | --: | --: |")
        for name in args.lines.split(","):
            print(returning(name, args), flush=True)
        return
    if args.neighbour:
        _neighbours(args)
        return
    lines = [measure(name, args.switches, args.prompt, args.folder) for name in args.lines.split(",")]
    print("| model | switch p50 | longest | floor | share of floor | already resident | vLLM 0.22.1 |")
    print("| --- | --: | --: | --: | --: | --: | --: |")
    for line in lines:
        median = statistics.median(line.switch_s)
        peer = VLLM_SWITCH_S.get(line.name)
        cells = (median, max(line.switch_s), line.floor_s)
        shown = " | ".join(f"{seconds * 1e3:.0f} ms" for seconds in cells)
        theirs = f"{peer * 1e3:.0f} ms" if peer else ""
        resident = f"{line.resident_s * 1e3:.0f} ms"
        print(f"| {line.name} | {shown} | {line.floor_s / median:.0%} | {resident} | {theirs} |", flush=True)


def _neighbours(args: argparse.Namespace) -> None:
    print(HEADER)
    losses = {}
    for name in args.lines.split(","):
        shape, checkpoints, _ = _two_models(name, args.folder)
        slab_bytes = _CPU_SLAB_BYTES if args.device == "cpu" else _SLAB_BYTES
        found = measure_neighbour(
            shape, checkpoints, args.neighbour, args.output, args.device, slab_bytes, args.repeats
        )
        print(found.row(name, args.neighbour), flush=True)
        losses[name] = found.loss
    late = [name for name, loss in losses.items() if loss > MOST_LOSS]
    if late and args.device != "cpu":
        raise SystemExit(f"{', '.join(late)}: a neighbour loses more than {MOST_LOSS:.0%}")


def returning(name: str, args: argparse.Namespace) -> str:
    """Measure the return of conversations with and without KV in host memory. Returns a row of the table."""
    tokens = args.returning_conversation
    shape, checkpoints, weight_bytes = _two_models(name, args.folder)
    kv_bytes = tokens * shape.kv_bytes_per_token
    limit_s = 1.3 * (weight_bytes + kv_bytes) / HOST_TO_DEVICE_BYTES_PER_S
    slab_bytes = _CPU_SLAB_BYTES if args.device == "cpu" else _SLAB_BYTES
    slabs = -(-weight_bytes // slab_bytes) + -(-kv_bytes // slab_bytes) + 1  # for one model and its conversation
    figures: list[float] = []
    resident_s = copied_back = 0.0
    for host_kv_bytes in (4 * kv_bytes + (1 << 30), 0):
        config = {
            "device": args.device,
            "slab_bytes": slab_bytes,
            "device_budget_bytes": slabs * slab_bytes,
            "host_budget_bytes": 2 * weight_bytes + host_kv_bytes + (1 << 30),
            "host_kv_bytes": host_kv_bytes,
            "oversubscribe": "disk" if args.device == "cpu" else "host",
        }
        with engine(config) as running:
            prompts = {model_id: _prompt(shape, model_id, tokens) for model_id in ("one", "two")}
            expected = {}
            for model_id, checkpoint in zip(prompts, checkpoints, strict=True):
                running.load(model_id, checkpoint)
                running.texts(prompts[model_id], 8)
                # From cached blocks, as after a return: what a whole prompt computes differs in its last bits.
                expected[model_id] = running.texts(prompts[model_id], 8)
            for prompt in prompts.values():
                _first_token_s(running, prompt)
            running.wait_idle(3.0)
            restored_before = _restored_blocks(running)
            times_s = []
            for number in range(args.switches):
                model_id = ("one", "two")[number % 2]
                times_s.append(_first_token_s(running, prompts[model_id]))
                if running.texts(prompts[model_id], 8) != expected[model_id]:
                    raise SystemExit(f"{name}: {model_id} gave other tokens after switch {number}")
            resident_s = resident_s or statistics.median(_first_token_s(running, prompts[model_id]) for _ in range(5))
            running.wait_idle(2.0)
            restored = _restored_blocks(running) - restored_before
            if restored and not host_kv_bytes:
                raise SystemExit(f"{name}: {restored} blocks were restored without host memory for KV")
            copied_back += restored * EngineConfig().block_tokens / (args.switches * tokens)
        figures += [statistics.median(times_s), max(times_s)]
    first, longest, again, longest_again = (f"{seconds * 1e3:.0f} ms" for seconds in figures)
    limit, resident = f"{limit_s * 1e3:.0f} ms", f"{resident_s * 1e3:.0f} ms"
    cells = (name, str(tokens), first, longest, f"{copied_back:.0%}", limit, again, longest_again, resident)
    return f"| {' | '.join(cells)} |"


def _restored_blocks(running: Engine) -> int:
    return sum(model.kv_restored_blocks_total for model in running.stats.models) if running.stats else 0


def _two_models(name: str, folder: Path) -> tuple[Shape, list[Checkpoint], int]:
    """Return the shape, two checkpoints of it and the larger one's weight bytes."""
    shape_name, _, format_ = name.partition("/")
    shape = SHAPES[shape_name]
    folders = [write(shape, folder / f"{shape_name}-{number}", seed=number) for number in range(2)]
    checkpoints = [checkpoint_of(path, format_, folder) for path in folders]
    return shape, checkpoints, max(checkpoint.weight_bytes for checkpoint in checkpoints)


def measure(name: str, switches: int, prompt_tokens: int, folder: Path) -> Line:
    shape, checkpoints, weight_bytes = _two_models(name, folder)
    budget = -(-weight_bytes // _SLAB_BYTES) * _SLAB_BYTES + _KV_BYTES
    config = {
        "device": "cuda",
        "device_budget_bytes": budget,
        "host_budget_bytes": 2 * weight_bytes + (2 << 30),
        "oversubscribe": "host",
    }
    with engine(config) as running:
        for model_id, checkpoint in zip(("one", "two"), checkpoints, strict=True):
            running.load(model_id, checkpoint)
        prompts = {model_id: _prompt(shape, model_id, prompt_tokens) for model_id in ("one", "two")}
        expected = {model_id: running.texts(prompt, 8) for model_id, prompt in prompts.items()}
        for prompt in prompts.values():  # a second round: both have been evicted and brought back once
            _first_token_s(running, prompt)
        running.wait_idle(3.0)
        switch_s = []
        for number in range(switches):
            model_id = ("one", "two")[number % 2]
            switch_s.append(_first_token_s(running, prompts[model_id]))
            if running.texts(prompts[model_id], 8) != expected[model_id]:
                raise SystemExit(f"{name}: {model_id} gave other tokens after switch {number}")
        resident_s = statistics.median(_first_token_s(running, prompts[model_id]) for _ in range(5))
    return Line(name, weight_bytes, switch_s, resident_s)


def _first_token_s(running: Engine, prompt: Prompts) -> float:
    timeline = running.generate(prompt, 1)
    return min(timeline.first_s.values())


def _prompt(shape: Shape, model_id: str, length: int) -> Prompts:
    rng = np.random.default_rng(len(model_id) + ord(model_id[0]))
    return [(model_id, rng.integers(100, shape.vocab, length, dtype=np.int32))]


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"{time.perf_counter() - started:.0f} s in all")
