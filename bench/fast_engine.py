"""An engine process without a model, to measure the runtime alone: it sends a token of each sequence at a fixed rate.

The ids are random, a step costs almost nothing, and the rate does not depend on readers. Uses runtime/ipc/messages.py.
"""

import argparse
import os
import random
import select
import socket
import time

import msgspec

from common.model_state import ModelFigures, Tier
from runtime.ipc.framing import FrameReader, encode_frame
from runtime.ipc.messages import (
    Abort,
    Add,
    Command,
    EngineStats,
    Event,
    Hello,
    Load,
    Loaded,
    RowTokens,
    Shutdown,
    Tokens,
    Unload,
    Unloaded,
)
from runtime.types import FinishReason, ModelFacts

_BYTES = 1 << 34
_WEIGHT_BYTES = 1 << 20


class FastEngine:
    def __init__(self, connection: socket.socket, step_s: float, vocab: int) -> None:
        self._connection = connection
        self._step_s = step_s
        self._vocab = vocab
        self._random = random.Random(0)
        decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
        self._reader = FrameReader(decoder)
        self._encoder = msgspec.msgpack.Encoder()
        self._models: dict[str, Load] = {}
        self._left: dict[int, tuple[str, int]] = {}  # request id → model, remaining tokens

    def run(self) -> None:
        self._send(Hello(os.getpid(), "cpu", "no device", _BYTES, 0, 1 << 22, 256))
        self._stats()
        next_step_s = next_stats_s = time.perf_counter()
        while True:
            now = time.perf_counter()
            if now >= next_stats_s:
                next_stats_s = now + 1.0
                self._stats()
            if self._left and now >= next_step_s:
                next_step_s = max(next_step_s + self._step_s, now)
                self._step()
            wait_s = max(0.0, (next_step_s if self._left else next_stats_s) - time.perf_counter())
            if select.select([self._connection], [], [], wait_s)[0] and not self._take():
                return

    def _step(self) -> None:
        rows: dict[str, list[RowTokens]] = {}
        for request_id, (model_id, left) in list(self._left.items()):
            finish = FinishReason.LENGTH if left == 1 else None
            rows.setdefault(model_id, []).append(
                RowTokens(request_id, (self._random.randrange(2, self._vocab),), finish)
            )
            if finish is None:
                self._left[request_id] = (model_id, left - 1)
            else:
                del self._left[request_id]
        for model_id, mine in rows.items():
            self._send(Tokens(model_id, tuple(mine)))

    def _take(self) -> bool:
        data = self._connection.recv(1 << 20)
        if not data:
            return False
        for command in self._reader.feed(data):
            match command:
                case Load():
                    self._load(command)
                case Unload(model_id=model_id):
                    self._models.pop(model_id, None)
                    self._send(Unloaded(model_id))
                case Add(request_id=request_id, model_id=model_id):
                    self._left[request_id] = (model_id, command.request.stop.max_tokens)
                case Abort(request_ids=request_ids):
                    for request_id in request_ids:
                        self._left.pop(request_id, None)
                case Shutdown():
                    return False
        return True

    def _load(self, command: Load) -> None:
        self._models[command.model_id] = command
        self._send(
            Loaded(
                ModelFacts(
                    model_id=command.model_id,
                    architecture="none",
                    path="none",
                    dtype=command.checkpoint.dtype,
                    quantization=command.checkpoint.quantization,
                    weight_bytes=_WEIGHT_BYTES,
                    kv_bytes_per_token=2,
                    max_model_len=8192,
                    vocab_size=self._vocab,
                    num_parameters=1,
                    eos_token_ids=(1,),
                )
            )
        )
        self._stats()

    def _stats(self) -> None:
        models = tuple(
            ModelFigures(
                model_id=model_id,
                tier=Tier.DEVICE,
                weight_bytes=_WEIGHT_BYTES,
                device_bytes=_WEIGHT_BYTES,
                kv_bytes=0,
                kv_used_tokens=0,
                kv_cached_tokens=0,
                running=sum(model == model_id for model, _ in self._left.values()),
                waiting=0,
                swap_in_s=0.0,
            )
            for model_id in self._models
        )
        self._send(EngineStats(_BYTES, _WEIGHT_BYTES * len(models), 0, 0, 0, models))

    def _send(self, event: Event) -> None:
        self._connection.sendall(encode_frame(self._encoder, event))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--socket", required=True)
    parser.add_argument("--step-s", type=float, required=True)
    parser.add_argument("--vocab", type=int, required=True)
    args = parser.parse_args()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(args.socket)
    FastEngine(connection, args.step_s, args.vocab).run()


if __name__ == "__main__":
    main()
