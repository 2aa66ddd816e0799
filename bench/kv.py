"""What an FP8 KV cache changes: a real model's log-probabilities and greedy text on any machine; speed with long contexts on a GPU.

    python -m bench.kv [--device auto] [--passages 8] [--length 512] [--shape 8B]

Quality: SmolLM2-135M-Instruct in bf16 over passages of this repository's documents, with KV in bf16 and in FP8 (e4m3), in the same run. Attention
reads every key and value back from the cache, prompt tokens' too, so prompt log-probabilities show the whole error. The peer is bf16 itself with its
batch cut differently (chunks of 64 tokens): what rounding alone does. Speed: random weights, 64 rows of 4,096 tokens, tokens per second of each.
"""

import argparse
import asyncio
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from bench.checkpoints import SHAPES, write
from bench.packed import checkpoint_of
from common.model_key import ModelSettings
from runtime.puller.cache import Cache
from runtime.puller.preparer import CheckpointPreparer
from runtime.types import Checkpoint, ModelSource
from tests.support.engine_process import Prompts, engine
from tests.support.smollm2 import gguf_path
from tests.support.sources import OPEN

DOCUMENTS = ("README.md", "docs/architecture.md", "docs/api.md", "docs/configuration.md", "CONTRIBUTING.md")
WAYS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "bf16, other chunks": {"max_batch_tokens": 64},
    "fp8": {"kv_dtype": "fp8"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--shape", default="8B")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/repertory-checkpoints"))
    parser.add_argument("--skip-quality", action="store_true")
    args = parser.parse_args()
    if not args.skip_quality:
        quality(args)
    if torch.cuda.is_available() and args.device != "cpu":
        speed(args)


def quality(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = asyncio.run(_smollm2(Path(folder)))
        tokenizer = Tokenizer.from_file(f"{checkpoint.model_dir}/tokenizer.json")
        root = Path(__file__).parents[1]
        ids = np.array(
            tokenizer.encode(
                "\n\n".join((root / name).read_text() for name in DOCUMENTS), add_special_tokens=False
            ).ids,
            np.int32,
        )
        starts = np.linspace(0, len(ids) - args.length, args.passages).astype(int)
        prompts: Prompts = [("smol", ids[start : start + args.length]) for start in starts]
        scores: dict[str, np.ndarray[Any, np.dtype[np.float64]]] = {}
        texts: dict[str, list[list[int]]] = {}
        for way, settings in WAYS.items():
            with engine(
                {"device": args.device, "device_budget_bytes": 2 << 30, "host_budget_bytes": 1 << 30, **settings}
            ) as running:
                running.load("smol", checkpoint, max_model_len=2048)
                scores[way] = np.concatenate(running.prompt_logprobs(prompts)).astype(np.float64)
                texts[way] = running.texts(prompts, args.new_tokens)
    print(
        f"SmolLM2-135M-Instruct, {args.passages} passages of {args.length} tokens; differences from bf16 in nats a token"
    )
    print(
        f"{'KV cache':>20} {'perplexity':>11} {'mean':>9} {'|mean|':>8} {'|p99|':>8}  greedy text agrees for (of {args.new_tokens} tokens, median)"
    )
    for way, found in scores.items():
        apart = found - scores["bf16"]
        same = [_agreeing(text, other) for text, other in zip(texts[way], texts["bf16"], strict=True)]
        print(
            f"{way:>20} {np.exp(-found.mean()):>11.4f} {apart.mean():>+9.5f} {np.abs(apart).mean():>8.5f} {np.quantile(np.abs(apart), 0.99):>8.4f}"
            f"  {np.median(same):.0f}",
            flush=True,
        )


def speed(args: argparse.Namespace) -> None:
    shape, rows, input_tokens, output_tokens = SHAPES[args.shape], 64, 4096, 128
    checkpoint = checkpoint_of(write(shape, args.folder / shape.name), "bf16", args.folder)
    rng = np.random.default_rng(5)
    gaps_ms = {}
    for way in ("bf16", "fp8"):
        with engine({"device": args.device, "host_budget_bytes": 1 << 30, **WAYS[way]}) as running:
            running.load("model", checkpoint)
            for turn in range(2):
                prompts: Prompts = [
                    ("model", rng.integers(100, shape.vocab, input_tokens, dtype=np.int32)) for _ in range(rows)
                ]
                run = running.generate(prompts, output_tokens)
                if not turn:
                    running.wait_idle(1.0)
            gaps_ms[way] = float(np.median(run.gaps_s)) * 1e3
            print(
                f"{shape.name}, {rows} rows of {input_tokens} tokens, KV in {way}: {gaps_ms[way]:.2f} ms a step, {run.tokens_per_s:.0f} tokens/s in all",
                flush=True,
            )
    print(f"a step with FP8 takes {gaps_ms['fp8'] / gaps_ms['bf16']:.2f} of one with bf16")


def _agreeing(text: list[int], other: list[int]) -> int:
    return next((at for at, (one, two) in enumerate(zip(text, other, strict=True)) if one != two), len(text))


async def _smollm2(folder: Path) -> Checkpoint:
    preparation = CheckpointPreparer(OPEN, Cache(folder / "cache", 4 << 30))
    settings = ModelSettings(max_model_len=2048, dtype="bfloat16")
    return (await preparation.prepare(ModelSource(str(gguf_path())), settings, "cpu", lambda progress: None)).checkpoint


if __name__ == "__main__":
    main()
