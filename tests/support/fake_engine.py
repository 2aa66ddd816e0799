"""A tiny engine process: speaks runtime.ipc.messages, "loads" anything, and echoes each prompt's tokens plus one, one token a step.

A model takes `checkpoint.weight_bytes`, divided by the devices of the engine. Model ids steer it: a load of "fail…" is refused, of "slow…" takes `--load-s`, of "deadly…" kills the process; a prompt that starts with KILL
ends the process by SIGKILL, one that starts with FAULT ends as ERROR; one that starts with STALL never gets a token. What it is told goes
to `--journal`.
"""

import argparse
import asyncio
import json
import os
import signal
import struct
from pathlib import Path

import msgspec

from common.exit_status import CANNOT_START
from common.model_state import ModelFigures, Tier
from runtime.config.schema import EngineConfig
from runtime.ipc.crash_marker import CrashMarker
from runtime.ipc.messages import (
    Abort,
    Add,
    Command,
    EngineStats,
    Event,
    Hello,
    Load,
    Loaded,
    LoadFailed,
    RowTokens,
    Shutdown,
    StartFailed,
    Tokens,
    Unload,
    Unloaded,
)
from runtime.types import FinishReason, ModelFacts

KILL = 999_001
FAULT = 999_002
STALL = 999_003
WEIGHT_BYTES = 1000
BUDGET_BYTES = 100_000
SLAB_BYTES = 4096


class FakeEngine:
    def __init__(
        self,
        writer: asyncio.StreamWriter,
        crash_marker: CrashMarker,
        journal: Path | None,
        load_s: float,
        step_s: float,
        config: EngineConfig,
    ) -> None:
        self.budget = config.device_budget_bytes or BUDGET_BYTES
        self.num_devices = config.tensor_parallel
        self.writer = writer
        self.crash_marker = crash_marker
        self.journal = journal
        self.load_s = load_s
        self.step_s = step_s
        self.models: dict[str, Load] = {}
        self.weights: dict[str, int] = {}
        self.loading: dict[str, asyncio.Task[None]] = {}
        self.rows: dict[int, asyncio.Task[None]] = {}
        self.row_models: dict[int, str] = {}

    def note(self, what: str, **facts: object) -> None:
        if self.journal is not None:
            with self.journal.open("a") as file:
                file.write(json.dumps({"what": what, "pid": os.getpid(), **facts}) + "\n")

    def send(self, event: Event) -> None:
        body = msgspec.msgpack.encode(event)
        self.writer.write(struct.pack("<I", len(body)) + body)

    def handle(self, command: Command) -> None:
        match command:
            case Load():
                self.note("load", model=command.model_id)
                self.loading[command.model_id] = asyncio.create_task(self.load(command))
            case Unload(model_id=model_id):
                self.note("unload", model=model_id)
                if (task := self.loading.pop(model_id, None)) is not None and not task.done():
                    task.cancel()
                    self.send(LoadFailed(model_id, "CANCELLED", "unloaded while loading"))
                self.models.pop(model_id, None)
                for request_id in [r for r, m in self.row_models.items() if m == model_id]:
                    self.end(request_id, FinishReason.ABORTED)
                self.send(Unloaded(model_id))
                self.stats()
            case Add():
                if command.model_id not in self.models:
                    row = RowTokens(
                        command.request_id, (), FinishReason.ERROR, error_code="NOT_FOUND", error="no such model"
                    )
                    self.send(Tokens(command.model_id, (row,)))
                    return
                self.row_models[command.request_id] = command.model_id
                self.rows[command.request_id] = asyncio.create_task(self.run(command))
            case Abort(request_ids=request_ids):
                for request_id in request_ids:
                    self.note("abort", request=request_id)
                    self.end(request_id, FinishReason.ABORTED)
            case Shutdown(grace_s=grace_s):
                asyncio.get_running_loop().create_task(self.shutdown(grace_s))

    async def load(self, command: Load) -> None:
        model_id = command.model_id
        if model_id.startswith("deadly"):
            await asyncio.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        if model_id.startswith("slow"):
            await asyncio.sleep(self.load_s)
        if model_id.startswith("fail"):
            self.send(LoadFailed(model_id, "RESOURCE_EXHAUSTED", f"model {model_id!r} needs 10 bytes of 5"))
            return
        weight_bytes = (command.checkpoint.weight_bytes or WEIGHT_BYTES) // self.num_devices
        if weight_bytes > self.budget:
            self.send(LoadFailed(model_id, "FAILED_PRECONDITION", f"it needs {weight_bytes} bytes", self.budget))
            return
        self.models[model_id] = command
        self.weights[model_id] = weight_bytes
        self.stats()  # before the answer, as the real engine
        self.send(
            Loaded(
                ModelFacts(
                    model_id=model_id,
                    architecture="FakeForCausalLM",
                    path="fused: fake",
                    dtype=command.checkpoint.dtype,
                    quantization=command.checkpoint.quantization,
                    weight_bytes=weight_bytes,
                    kv_bytes_per_token=2,
                    max_model_len=command.max_model_len or 64,
                    vocab_size=1_000_000,
                    num_parameters=500,
                    eos_token_ids=(2,),
                )
            )
        )

    async def run(self, add: Add) -> None:
        prompt, max_tokens = add.request.prompt, add.request.stop.max_tokens
        self.crash_marker.mark(add.model_id)
        await asyncio.sleep(self.step_s)
        if prompt[0] == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt[0] == FAULT:
            self.finish(
                add, RowTokens(add.request_id, (), FinishReason.ERROR, error_code="INTERNAL", error="a step broke")
            )
            return
        if prompt[0] == STALL:
            await asyncio.sleep(3600)
        for position in range(max_tokens):
            last = position == max_tokens - 1
            row = RowTokens(
                add.request_id, (prompt[position % len(prompt)] + 1,), FinishReason.LENGTH if last else None
            )
            if last:
                self.finish(add, row)
            else:
                self.send(Tokens(add.model_id, (row,)))
                await asyncio.sleep(self.step_s)

    def finish(self, add: Add, row: RowTokens) -> None:
        self.rows.pop(add.request_id, None)
        self.row_models.pop(add.request_id, None)
        if not self.rows:
            self.crash_marker.mark("")
        self.send(Tokens(add.model_id, (row,)))

    def end(self, request_id: int, finish: FinishReason) -> None:
        task = self.rows.pop(request_id, None)
        model_id = self.row_models.pop(request_id, "")
        if task is not None:
            task.cancel()
            self.send(Tokens(model_id, (RowTokens(request_id, (), finish),)))

    def stats(self) -> None:
        models = tuple(
            ModelFigures(
                model_id=model_id,
                tier=Tier.DEVICE,
                weight_bytes=self.weights[model_id],
                device_bytes=self.weights[model_id],
                kv_bytes=0,
                kv_used_tokens=0,
                kv_cached_tokens=0,
                running=sum(m == model_id for m in self.row_models.values()),
                waiting=0,
                swap_in_s=0.0,
            )
            for model_id in self.models
        )
        self.send(EngineStats(self.budget, sum(model.device_bytes for model in models), 0, 0, 0, models))

    async def shutdown(self, grace_s: float) -> None:
        if self.rows:
            await asyncio.wait(self.rows.values(), timeout=grace_s)
        await self.writer.drain()
        self.writer.close()
        os._exit(0)


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("--crash-marker", required=True)
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--load-s", type=float, default=0.3)
    parser.add_argument("--step-s", type=float, default=0.002)
    parser.add_argument("--stillborn", action="store_true")
    parser.add_argument("--unfit", default="")
    options = parser.parse_args()
    if options.stillborn:
        raise SystemExit(3)
    reader, writer = await asyncio.open_unix_connection(options.socket)
    config = msgspec.json.decode(options.config, type=EngineConfig)
    marker = CrashMarker(options.crash_marker)
    engine = FakeEngine(writer, marker, options.journal, options.load_s, options.step_s, config)
    engine.note("start")
    if options.unfit:
        engine.send(StartFailed(options.unfit))
        await writer.drain()
        os._exit(CANNOT_START)
    engine.send(Hello(os.getpid(), "cpu", "fake device", engine.budget, 0, SLAB_BYTES, 256))
    engine.stats()
    decoder = msgspec.msgpack.Decoder(Command)
    while True:
        try:
            (length,) = struct.unpack("<I", await reader.readexactly(4))
            engine.handle(decoder.decode(await reader.readexactly(length)))
        except (asyncio.IncompleteReadError, ConnectionError):
            os._exit(0)


if __name__ == "__main__":
    asyncio.run(main())
