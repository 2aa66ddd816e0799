"""Measures what a grammar costs: tokens per second of rows that follow a JSON schema, of the rows beside them, and the first token.

    python -m bench.structured                                 SmolLM2 on a CPU: one guided row beside 1, 8 and 32 others
    python -m bench.structured --device cuda [--line 8B/bf16]  random weights on a GPU: 64 rows

Rows have random prompts and end at --tokens tokens. A guided row writes a list of orders whose schema never ends it before. The tokenizer of
random weights is made on the spot. Each figure is the median of --repeats runs of which the first is dropped.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bench.checkpoints import SHAPES, write
from bench.packed import checkpoint_of, random_packed
from common.model_key import ModelSettings
from runtime.config.schema import RuntimeConfig
from runtime.puller.cache import Cache
from runtime.puller.preparer import CheckpointPreparer
from runtime.text.constraint import JsonSchema, Wanted
from runtime.text.grammar import answer_grammar
from runtime.types import Checkpoint, GenerationRequest, Grammar, ModelSource, SamplingParams, StopParams
from tests.support.engine_process import Engine, Timeline, engine
from tests.support.smollm2 import gguf_path

INPUT_TOKENS = 64
_LETTERS = "etaoinshrdlcumwfgypbvkjxqz"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--line", default="8B/bf16", help="shape and format of the random weights")
    parser.add_argument("--rows", default="", help="comma separated; default 1,8,32 on a CPU and 64 on a GPU")
    parser.add_argument(
        "--tokens", type=int, default=0, help="output tokens of a row; default 48 on a CPU, 512 on a GPU"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--settle",
        type=float,
        default=20.0,
        help="seconds for the captures of graphs, which run while a GPU's engine is idle",
    )
    parser.add_argument("--folder", type=Path, default=Path("/tmp/repertory-checkpoints"))
    parser.add_argument("--log", type=Path, default=None)
    args = parser.parse_args()
    on_cpu = args.device == "cpu"
    rows = [int(text) for text in (args.rows or ("1,8,32" if on_cpu else "64")).split(",")]
    tokens = args.tokens or (48 if on_cpu else 512)
    with tempfile.TemporaryDirectory(prefix="repertory-structured-") as folder:
        checkpoint, vocab = _smollm2(Path(folder)) if on_cpu else _random(args.line, args.folder, Path(folder))
        config: dict[str, Any] = {"device": args.device, "max_rows": 512, "host_budget_bytes": 8 << 30}
        with engine(config, log=args.log) as running:
            running.load("m", checkpoint)
            time.sleep(0 if on_cpu else args.settle)
            bench = Bench(running, vocab, tokens, args.repeats)
            bench.first_tokens()
            for count in rows:
                bench.beside(count) if on_cpu else bench.together(count)
            running.unload("m")


class Bench:
    """The measurements over one loaded model."""

    def __init__(self, running: Engine, vocab: int, tokens: int, repeats: int) -> None:
        self._running = running
        self._vocab = vocab
        self._tokens = tokens
        self._repeats = repeats
        self._rng = np.random.default_rng(7)
        self._guided = grammar_of(order_schema("order"))

    def first_tokens(self) -> None:
        """Print the time to the first token of one request alone, without and with a grammar: medians but for the first of a tokenizer."""
        plain = statistics.median(self._first(None) for _ in range(5))
        built = self._first(grammar_of(order_schema("first")))
        new = statistics.median(self._first(grammar_of(order_schema(f"new {number}"))) for number in range(5))
        known = statistics.median(self._first(grammar_of(order_schema("first"))) for _ in range(5))
        print(
            f"\nfirst token of one request: no grammar {plain * 1e3:.1f} ms, new tokenizer and schema {built * 1e3:.1f} ms, "
            f"new schema {new * 1e3:.1f} ms, known schema {known * 1e3:.1f} ms",
            flush=True,
        )

    def beside(self, count: int) -> None:
        """Print the cost per token of one guided row in a batch of `count` others, and what it costs these."""
        pairs = [
            (self._once([None] * (count + 1)), self._once([self._guided, *[None] * count]))
            for _ in range(self._repeats + 1)
        ][1:]
        guided = [_row_seconds(run, slice(1)) / _row_seconds(run, slice(1, None)) for _, run in pairs]
        others = [_row_seconds(run, slice(1, None)) / _row_seconds(plain, slice(None)) for plain, run in pairs]
        print(
            f"1 guided beside {count:>2}: a token of the guided row takes {statistics.median(guided):.3f} of one of the others; these take "
            f"{statistics.median(others):.3f} of what they take in a batch without a grammar ({min(others):.3f} to {max(others):.3f})",
            flush=True,
        )

    def together(self, count: int) -> None:
        """Print tokens per second of `count` rows: none, one, half and all of them guided."""
        print(
            f"\n{count} rows of {INPUT_TOKENS} + {self._tokens} tokens; tokens per second and row of a kind, and the share of the plain batch's"
        )
        plain = 1 / statistics.median(_row_seconds(run, slice(None)) for run in self._runs([None] * count))
        print(f"{'guided':>8} {'guided rows':>20} {'other rows':>20}")
        print(f"{0:>8} {'':>20} {plain:>12.2f} {1:>7.3f}", flush=True)
        for guided in (1, count // 2, count):
            runs = self._runs([self._guided] * guided + [None] * (count - guided))
            cells = []
            for part in (slice(guided), slice(guided, None)) if guided < count else (slice(guided),):
                rate = 1 / statistics.median(_row_seconds(run, part) for run in runs)
                cells.append(f"{rate:>12.2f} {rate / plain:>7.3f}")
            print(f"{guided:>8} {' '.join(cells)}", flush=True)

    def _first(self, grammar: Grammar | None) -> float:
        run = self._running.run([("m", self._request(grammar, 2))])
        time.sleep(0.05)
        return run.first_s[run.ids[0]]

    def _once(self, grammars: Sequence[Grammar | None]) -> Timeline:
        run = self._running.run([("m", self._request(grammar, self._tokens)) for grammar in grammars])
        time.sleep(0.05)
        return run

    def _runs(self, grammars: Sequence[Grammar | None]) -> list[Timeline]:
        """Run a batch of these rows several times, without the first."""
        return [self._once(grammars) for _ in range(self._repeats + 1)][1:]

    def _request(self, grammar: Grammar | None, tokens: int) -> GenerationRequest:
        prompt = self._rng.integers(100, self._vocab, INPUT_TOKENS)
        return GenerationRequest(
            prompt=tuple(prompt.tolist()),
            sampling=SamplingParams(temperature=1.0, seed=int(prompt[0])),
            stop=StopParams(tokens, ignore_eos=True),
            grammar=grammar,
        )


def _row_seconds(run: Timeline, part: slice) -> float:
    """Return the mean time per token of some rows, from a row's first token to its last."""
    ids = run.ids[part]
    return statistics.mean((run.last_s[i] - run.first_s[i]) / max(1, run.counts[i] - 1) for i in ids)


def order_schema(field: str) -> dict[str, Any]:
    """A list of at least 1000 orders; `field` makes the schema a new one."""
    order = {
        field: {"type": "string", "format": "uuid"},
        "customer": {"type": "string", "minLength": 3, "maxLength": 24},
        "status": {"enum": ["open", "paid", "shipped", "cancelled"]},
        "quantity": {"type": "integer", "minimum": 1, "maximum": 500},
        "price": {"type": "number", "minimum": 0, "maximum": 9999},
        "comment": {"anyOf": [{"type": "string", "maxLength": 40}, {"type": "null"}]},
    }
    item = {"type": "object", "properties": order, "required": list(order), "additionalProperties": False}
    return {
        "type": "object",
        "properties": {"orders": {"type": "array", "items": item, "minItems": 1000}},
        "required": ["orders"],
        "additionalProperties": False,
    }


def grammar_of(schema: dict[str, Any]) -> Grammar:
    return Grammar(answer_grammar(Wanted(JsonSchema(schema), "schema"))[0])


def _smollm2(folder: Path) -> tuple[Checkpoint, int]:
    async def prepare() -> Checkpoint:
        preparation = CheckpointPreparer(
            RuntimeConfig(model_roots=(str(gguf_path().parent),)), Cache(folder / "cache", 4 << 30)
        )
        settings = ModelSettings(max_model_len=1024)
        return (
            await preparation.prepare(ModelSource(str(gguf_path())), settings, "cpu", lambda progress: None)
        ).checkpoint

    return asyncio.run(prepare()), 49_152


def _random(line: str, cache: Path, folder: Path) -> tuple[Checkpoint, int]:
    name, format_ = line.split("/")
    shape = SHAPES[name]
    if format_ in ("bf16", "fp32"):
        made = checkpoint_of(write(shape, cache / name), format_, cache)
    else:
        made = random_packed(shape, format_, cache)
    # The weights stay where they are; the configuration and the tokenizer lie in a folder of this run.
    (folder / "config.json").write_bytes(Path(made.model_dir, "config.json").read_bytes())
    write_tokenizer(folder, shape.vocab)
    return msgspec.structs.replace(made, model_dir=str(folder)), shape.vocab


def write_tokenizer(folder: Path, vocab: int) -> None:
    """Write a byte-level BPE tokenizer of `vocab` tokens: bytes, and pieces of up to six characters as words, numbers and JSON have them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = {"<s>": 0, "</s>": 1}
    for character in alphabet:
        pieces[character] = len(pieces)
    merges: list[tuple[str, str]] = []

    def add(left: str, right: str) -> None:
        if left + right not in pieces and len(pieces) < vocab:
            merges.append((left, right))
            pieces[left + right] = len(pieces)

    for left, right in itertools.product('Ġ{}[]":,', '"{}[]:,Ġ'):
        add(left, right)
    for length in range(2, 7):
        shorter = [
            piece for piece in pieces if len(piece) == length - 1 and (piece[0] in "Ġ" + _LETTERS or piece.isdigit())
        ]
        for left, right in itertools.product(shorter, _LETTERS + "0123456789"):
            if right.isdigit() == left.isdigit():
                add(left, right)
    tokenizer = Tokenizer(models.BPE(vocab=pieces, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


if __name__ == "__main__":
    main()
