"""From nothing to the first token, on one GPU: `repertory serve` until it is ready, and bf16 from local disk through it; then the engine alone, with
a 4-bit model the first time and from its packed file (or any other of --formats).

    python -m bench.start [--shape 8B] [--formats nf4] [--folder /tmp/checkpoints] [--fresh]

The page cache is warm and the host arena still registering. Each line has a process of its own, so nothing is mapped before. "packing" runs the
packer's process, as a first load of a 4-bit model does. --fresh: compiled kernels are forgotten before each line, as on a machine that never ran
this. Random weights.
"""

import argparse
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench import load
from bench.checkpoints import SHAPES, Shape, write
from bench.packed import checkpoint_of
from tests.support import stack
from tests.support.engine_process import engine

READY_S = 10.0
ASKED_S = {"bf16": 6.0, "nf4 packing": 25.0, "nf4": 3.0}
VLLM_S = {"bf16": 44.8, "nf4 packing": 72.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8B")
    parser.add_argument("--formats", default="nf4")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/repertory-checkpoints"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--fresh", action="store_true")
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    folder = write(shape, args.folder / args.shape)
    with _caches(args.fresh):
        through_serve(shape, folder, args.device)
    for format_ in args.formats.split(","):
        if format_ in stack.DTYPES:
            with _caches(args.fresh):
                first_token(shape, folder, format_, args.folder, args.device, format_)
            continue
        shutil.rmtree(args.folder / f"{args.shape}-{format_}", ignore_errors=True)
        with _caches(args.fresh):
            first_token(shape, folder, format_, args.folder, args.device, f"{format_} packing")
        with _caches(args.fresh):
            first_token(shape, folder, format_, args.folder, args.device, format_)


@contextlib.contextmanager
def _caches(fresh: bool) -> Iterator[None]:
    """Give child processes empty compiler caches if `fresh`, otherwise the existing ones."""
    with tempfile.TemporaryDirectory(prefix="repertory-caches-") as folder:
        if fresh:
            os.environ["TRITON_CACHE_DIR"], os.environ["XDG_CACHE_HOME"] = f"{folder}/triton", f"{folder}/cache"
        yield


def through_serve(shape: Shape, folder: Path, device: str) -> None:
    """One request over HTTP, sent when the mesh says that the model is loaded."""
    dtype = "float32" if device == "cpu" else "bfloat16"
    with stack.serve("--device", device) as server:
        loaded_s = stack.load_and_wait(server, "start", f"file://{folder}", dtype=dtype)
        first = load.run_spread(server.url, "start", load.Workload(1, 64, 2, shape.vocab), 1)
    print(
        f"{shape.name} {dtype} through `repertory serve`: ready after {server.ready_s:.1f} s (asked {READY_S:g}); first token "
        f"{loaded_s + first.ttft_p50_s:.2f} s after loadModel (loading {loaded_s:.2f}, answer {first.ttft_p50_s:.2f}); asked {ASKED_S['bf16']}, "
        f"vLLM {VLLM_S['bf16']}",
        flush=True,
    )


def first_token(shape: Shape, folder: Path, format_: str, cache: Path, device: str, name: str) -> None:
    with engine({"device": device}) as running:
        started = time.perf_counter()
        checkpoint = checkpoint_of(folder, format_, cache)
        packed_s = time.perf_counter() - started
        _, loaded_s = running.load("model", checkpoint)
        ids = np.random.default_rng(1).integers(100, shape.vocab, 64, dtype=np.int32)
        answered_s = running.generate([("model", ids)], 1).wall_s
        total = packed_s + loaded_s + answered_s
        again_s = running.generate([("model", ids[::-1].copy())], 1).wall_s
    asked, peer = ASKED_S.get(name), VLLM_S.get(name)
    print(
        f"{shape.name} {name}: ready after {running.ready_s:.1f} s; first token {total:.2f} s after loadModel (packing {packed_s:.1f}, loading {loaded_s:.2f}, "
        f"answer {answered_s:.2f}; the next prompt's {again_s * 1e3:.0f} ms); asked {asked or '-'}, vLLM {peer or '-'}",
        flush=True,
    )


if __name__ == "__main__":
    main()
