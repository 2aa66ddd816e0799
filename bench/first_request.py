"""The first request after a load on a GPU whose kernel caches are empty, beside later ones; and many engine starts at once.

    python -m bench.first_request [--lines 8B/bf16,8B/nf4,8B/fp4,8B/int8,8B/fp8,1B/bf16] [--starts 30 --at-once 5]

Every engine has caches of its own. A request has 256 ids. Exits 1 if a first token takes more than twice as long as the steady one, or if an engine
of --starts fails or gives another text than the others. Random weights.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bench.checkpoints import SHAPES, write
from bench.packed import random_packed
from common.model_key import Quantization
from common.units import GIB
from runtime.types import Checkpoint
from tests.support.engine_process import engine

LARGEST_RATIO = 2.0
_IDS = 256
_REPEATS = 7
_WARMUP_S, _CAPTURE_S = 8.0, 4.0  # until warmup threads have ended, and until graphs are captured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", default="8B/bf16,8B/nf4,8B/fp4,8B/int8,8B/fp8,1B/bf16")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/repertory-checkpoints"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--starts", type=int, default=0, help="engines to start with a small model, after the lines")
    parser.add_argument("--at-once", type=int, default=5)
    args = parser.parse_args()
    failed = False
    if args.lines:
        print("| model | loading | first token | steady (p50) | ratio |\n| --- | --: | --: | --: | --: |", flush=True)
        for line in args.lines.split(","):
            failed |= first_request(line, args.folder, args.device) > LARGEST_RATIO
    if args.starts:
        failed |= not many_starts(args.starts, args.at_once, args.folder, args.device)
    return int(failed)


def first_request(line: str, folder: Path, device: str) -> float:
    """Print one line. Returns the first time to first token over the steady one."""
    shape_name, format_ = line.split("/")
    shape = SHAPES[shape_name]
    checkpoint = checkpoint_of(shape_name, format_, folder)
    rng = np.random.default_rng(1)
    with empty_caches(), engine({"device": device}) as running:
        _, loaded_s = running.load("m", checkpoint)

        def first_token_s() -> float:
            ids = rng.integers(100, shape.vocab, _IDS, dtype=np.int32)
            return running.generate([("m", ids)], 1).wall_s

        first_s = first_token_s()
        running.wait_idle(_WARMUP_S)
        for _ in range(2):
            first_token_s()
        running.wait_idle(_CAPTURE_S)
        steady_s = statistics.median(first_token_s() for _ in range(_REPEATS))
    ratio = first_s / steady_s
    print(f"| {line} | {loaded_s:.2f} s | {first_s * 1e3:.0f} ms | {steady_s * 1e3:.0f} ms | {ratio:.1f} |", flush=True)
    return ratio


def many_starts(count: int, at_once: int, folder: Path, device: str) -> bool:
    """Start engines with empty caches, `at_once` at a time. Returns whether all of them gave the same text."""
    checkpoint = checkpoint_of("1B", "bf16", folder)
    budget: dict[str, Any] = {"device": device, "device_budget_bytes": 6 * GIB, "host_budget_bytes": 4 * GIB}

    def start(number: int) -> list[list[int]] | str:
        try:
            with tempfile.TemporaryDirectory() as home, engine(budget, environment=_caches(home)) as running:
                running.load("m", checkpoint)
                rng = np.random.default_rng(7)
                prompts = [("m", rng.integers(100, 1000, size, dtype=np.int32)) for size in (3, 40, 256, 700)]
                return running.texts(prompts, 24)
        except (RuntimeError, TimeoutError, AssertionError) as error:
            return f"engine {number}: {error}"

    with ThreadPoolExecutor(at_once) as pool:
        found = list(pool.map(start, range(count)))
    errors = [one for one in found if isinstance(one, str)]
    texts = {repr(one) for one in found if not isinstance(one, str)}
    print(f"{count} starts, {at_once} at once: {len(errors)} failed, {len(texts)} different texts", flush=True)
    for error in errors:
        print(error, flush=True)
    return not errors and len(texts) == 1


def checkpoint_of(shape: str, format_: str, folder: Path) -> Checkpoint:
    if format_ != "bf16":
        return random_packed(SHAPES[shape], format_, folder)
    path = write(SHAPES[shape], folder / shape)
    files = tuple(str(file) for file in sorted(path.glob("*.safetensors")))
    return Checkpoint(str(path), files, None, Quantization.NONE, "bfloat16", sum(Path(f).stat().st_size for f in files))


def _caches(home: str) -> dict[str, str]:
    return {**os.environ, "TRITON_CACHE_DIR": f"{home}/triton", "XDG_CACHE_HOME": f"{home}/cache"}


@contextlib.contextmanager
def empty_caches() -> Iterator[None]:
    """Give child processes empty compiler caches while the body runs."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="repertory-caches-") as home:
        os.environ.update(_caches(home))
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


if __name__ == "__main__":
    sys.exit(main())
