"""Load for an OpenAI server: N streams at once of random token ids, and what came back when. Knows nothing of who serves."""

import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass

import aiohttp


@dataclass(frozen=True, slots=True)
class Workload:
    """`num_requests` sequences submitted at once, each with `input_tokens` random ids and exactly `output_tokens` answers."""

    num_requests: int
    input_tokens: int
    output_tokens: int
    vocab_size: int
    seed: int = 0

    def prompts(self) -> list[list[int]]:
        rng = random.Random(self.seed)
        # the lowest ids are special tokens in most vocabularies
        return [[rng.randrange(100, self.vocab_size) for _ in range(self.input_tokens)] for _ in range(self.num_requests)]


@dataclass(frozen=True, slots=True)
class Answer:
    """One stream: when it was sent, when each event with text came (seconds, one clock), and how many tokens the usage chunk counted."""

    sent_s: float
    events_s: tuple[float, ...]
    ended_s: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Outcome:
    tokens_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    gap_p50_s: float
    gap_p99_s: float
    wall_s: float
    tokens: int

    @staticmethod
    def of(answers: list[Answer]) -> "Outcome":
        start = min(answer.sent_s for answer in answers)
        wall = max(answer.ended_s for answer in answers) - start
        tokens = sum(answer.tokens for answer in answers)
        first = [answer.events_s[0] - answer.sent_s for answer in answers if answer.events_s]
        gaps = [b - a for answer in answers for a, b in zip(answer.events_s, answer.events_s[1:], strict=False)]
        return Outcome(
            tokens / wall, _quantile(first, 0.5), _quantile(first, 0.99), _quantile(gaps, 0.5), _quantile(gaps, 0.99), wall, tokens
        )


def _quantile(values: list[float], share: float) -> float:
    if not values:
        return float("nan")
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if share != 0.5 else statistics.median(values)


async def run(url: str, model: str, workload: Workload, headers: dict[str, str] | None = None) -> Outcome:
    """`url` is a base such as http://127.0.0.1:8080. Raises RuntimeError if a stream ends early or with an error."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None), headers=headers) as session:
        answers = await asyncio.gather(
            *(_one(session, f"{url}/v1/completions", model, prompt, workload.output_tokens) for prompt in workload.prompts())
        )
    return Outcome.of(list(answers))


async def _one(session: aiohttp.ClientSession, url: str, model: str, prompt: list[int], output_tokens: int) -> Answer:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent = time.perf_counter()
    events: list[float] = []
    last = b""
    async with session.post(url, json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"HTTP {response.status}: {(await response.text())[:300]}")
        rest = b""
        async for chunk in response.content.iter_any():
            now = time.perf_counter()
            *lines, rest = (rest + chunk).split(b"\n\n")
            for line in lines:
                if line.startswith(b"data: {"):
                    events.append(now)
                    last = line
    ended = time.perf_counter()
    if b'"error"' in last[:20]:
        raise RuntimeError(last.decode())
    usage = json.loads(last[6:]).get("usage") or {}
    tokens = int(usage.get("completion_tokens", 0))
    if tokens != output_tokens:
        raise RuntimeError(f"asked for {output_tokens} tokens, got {tokens}")
    return Answer(sent, tuple(events[:-1]), ended, tokens)  # the last event is the usage chunk
