"""Counts what is answered while the names in use change: six models, room for three, three in use, another choice every ten seconds.

    python -m bench.names [--seconds 60] [--clients 8] [--at-once 300]

ModelMesh's own pods over the same runtime answered 561 of 625 calls, with a churn guard of 10 s, and refused the rest with its churn text.
Every answer is compared with the model's text when it ran alone. Afterwards all `--at-once` calls go to one model together.
"""

import argparse
import asyncio
import random
import re
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.support import stack
from tests.support.checkpoints import tiny_llama

NUM_MODELS, NUM_IN_USE, CHANGE_S = 6, 3, 10.0
MODELMESH = "561 of 625 (90 %)"
TOKENS = 64
TIMEOUT_S = 60.0


@dataclass
class Tally:
    """`refused`: calls by the first words of their error."""

    answered: int = 0
    wrong: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)

    def line(self, what: str) -> str:
        total = self.answered + self.wrong + self.refused.total()
        ranked = sorted(self.seconds) or [0.0]
        p50, p99 = (ranked[min(len(ranked) - 1, int(len(ranked) * part))] for part in (0.5, 0.99))
        refusals = "".join(f"; {count} × {text}" for text, count in self.refused.most_common())
        share = self.answered / total if total else 0.0
        return (
            f"{what}: {self.answered} of {total} answered ({share:.1%}), {self.wrong} wrong, "
            f"p50 {p50:.2f} s, p99 {p99:.2f} s{refusals}"
        )


async def call(session: aiohttp.ClientSession, name: str) -> tuple[str, str]:
    """Return the answer's text and an empty string, or an empty string and the error."""
    body = {"model": name, "prompt": "hello", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    try:
        async with session.post("/v1/completions", json=body) as response:
            answer: dict[str, Any] = await response.json()
    except (aiohttp.ClientError, TimeoutError) as error:
        return "", type(error).__name__
    if response.status == 200:
        return str(answer["choices"][0]["text"]), ""
    return "", str(answer["error"]["message"])[:60]


async def count(session: aiohttp.ClientSession, tally: Tally, name: str, wanted: dict[str, str]) -> None:
    started_s = time.perf_counter()
    text, error = await call(session, name)
    tally.seconds.append(time.perf_counter() - started_s)
    if error:
        tally.refused[error] += 1
    elif text == wanted[name]:
        tally.answered += 1
    else:
        tally.wrong += 1


async def change_names(session: aiohttp.ClientSession, wanted: dict[str, str], seconds: float, clients: int) -> Tally:
    tally, draw = Tally(), random.Random(1)
    in_use = draw.sample(sorted(wanted), NUM_IN_USE)
    end_s = time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < end_s:
            await count(session, tally, draw.choice(in_use), wanted)

    running = [asyncio.create_task(client()) for _ in range(clients)]
    while time.perf_counter() < end_s:
        await asyncio.sleep(CHANGE_S)
        in_use[:] = draw.sample(sorted(wanted), NUM_IN_USE)
    await asyncio.gather(*running)
    return tally


async def measure(url: str, names: list[str], args: argparse.Namespace) -> None:
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        wanted = {name: (await call(session, name))[0] for name in names}
        if not all(wanted.values()):
            raise SystemExit("a model gave no text when it ran alone")
        print((await change_names(session, wanted, args.seconds, args.clients)).line("names change"))
        print(f"ModelMesh, same load, guard 10 s: {MODELMESH}")
        at_once = Tally()
        await asyncio.gather(*(count(session, at_once, names[0], wanted) for _ in range(args.at_once)))
        print(at_once.line(f"{args.at_once} calls at once"))
        async with session.get("/metrics") as answer:
            text = await answer.text()
        loads = re.findall(r'^repertory_mesh_loads_total\{.*outcome="loaded"\} (\S+)$', text, re.MULTILINE)
        print(f"loads: {sum(map(float, loads)):.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--at-once", type=int, default=300)
    parser.add_argument("--log", type=Path, default=None, help="file for the servers' output")
    args = parser.parse_args()
    names = [f"model-{number}" for number in range(NUM_MODELS)]
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(names):
            tiny_llama(Path(folder) / name, number, hidden=256, layers=8)
        with stack.serve("--device", "cpu", "--memory", "1GiB", log=args.log) as served:
            stack.load_and_wait(served, names[0], f"{folder}/{names[0]}")
            model_bytes = served.admin.pods()[0].used_bytes
        room = NUM_IN_USE * model_bytes + model_bytes // 2
        print(f"one model takes {model_bytes / 2**20:.1f} MiB; the capacity is {room / 2**20:.1f} MiB")
        with stack.serve("--device", "cpu", "--memory", str(room), log=args.log) as served:
            for name in names:
                served.admin.register({"name": name, "uri": f"{folder}/{name}"})
            asyncio.run(measure(served.url, names, args))


if __name__ == "__main__":
    main()
