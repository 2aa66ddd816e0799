"""From loadModel on a ready engine to the first token, on one GPU: bf16 from local disk, a 4-bit model the first time, and from its packed file.

    python -m bench.start [--shape 8B] [--formats bf16,nf4] [--folder /tmp/checkpoints]

The page cache is warm and the host arena still registering. Each line has an engine of its own, so nothing is compiled or mapped before. "packing" runs
the packer's process, as a first load of a 4-bit model does. Random weights.
"""

import argparse
import shutil
import time
from pathlib import Path

import numpy as np

from bench.checkpoints import SHAPES, Shape, write
from bench.engine_process import engine
from bench.packed import checkpoint_of

ASKED_S = {"bf16": 6.0, "nf4 packing": 25.0, "nf4": 3.0}
VLLM_S = {"bf16": 44.8, "nf4 packing": 72.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8B")
    parser.add_argument("--formats", default="bf16,nf4")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/repertory-checkpoints"))
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    folder = write(shape, args.folder / args.shape)
    for format_ in args.formats.split(","):
        if format_ == "bf16":
            first_token(shape, folder, "bf16", args.folder, args.device, "bf16")
            continue
        shutil.rmtree(args.folder / f"{args.shape}-{format_}", ignore_errors=True)
        first_token(shape, folder, format_, args.folder, args.device, f"{format_} packing")
        first_token(shape, folder, format_, args.folder, args.device, format_)


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
