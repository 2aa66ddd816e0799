"""Generates load for an OpenAI server: N concurrent streams of random token ids, with the time of each event.

The client reads bytes and counts events, no more, so that one process of it keeps up with what one server process can send; `run_spread` takes
several. As a program (`python -m bench.load`) it is one of those: a job as JSON on stdin, a line "go" when all are connected, a report on stdout.
"""

import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

import uvloop

_EVENT = b"data: {"


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
        return [
            [rng.randrange(100, self.vocab_size) for _ in range(self.input_tokens)] for _ in range(self.num_requests)
        ]


@dataclass(frozen=True, slots=True)
class Answer:
    """One stream: when it was sent, when each event with text came (seconds, one clock for all processes), its tokens by the usage chunk."""

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
    events: int
    client_cpu_s: float  # of all client processes; 0 if the caller was the client

    @staticmethod
    def of(answers: list[Answer], client_cpu_s: float = 0.0) -> "Outcome":
        start = min(answer.sent_s for answer in answers)
        wall = max(answer.ended_s for answer in answers) - start
        tokens = sum(answer.tokens for answer in answers)
        first = [answer.events_s[0] - answer.sent_s for answer in answers if answer.events_s]
        gaps = [b - a for answer in answers for a, b in zip(answer.events_s, answer.events_s[1:], strict=False)]
        return Outcome(
            tokens / wall,
            quantile(first, 0.5),
            quantile(first, 0.99),
            quantile(gaps, 0.5),
            quantile(gaps, 0.99),
            wall,
            tokens,
            sum(len(answer.events_s) for answer in answers),
            client_cpu_s,
        )


def quantile(values: list[float], share: float) -> float:
    if not values:
        return float("nan")
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if share != 0.5 else statistics.median(values)


async def run(url: str, model: str, workload: Workload, headers: dict[str, str] | None = None) -> Outcome:
    """`url`: a base such as http://127.0.0.1:8080, or unix:PATH. Raises RuntimeError if a stream ends early or with an error."""
    streams = await _connect(url, model, workload.prompts(), workload.output_tokens, headers or {})
    return Outcome.of(await _run_all(streams))


def run_spread(
    url: str, model: str, workload: Workload, processes: int, headers: dict[str, str] | None = None
) -> Outcome:
    """Like `run`, but divided over several client processes. Blocks."""
    prompts = workload.prompts()
    clients = [
        subprocess.Popen([sys.executable, "-m", "bench.load"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    try:
        for number, client in enumerate(clients):
            job = {
                "url": url,
                "model": model,
                "prompts": prompts[number::processes],
                "output_tokens": workload.output_tokens,
            }
            _tell(client, json.dumps({**job, "headers": headers or {}}))
        for client in clients:
            _hear(client)  # connected
        for client in clients:
            _tell(client, "go")
        reports = [json.loads(_hear(client)) for client in clients]
        answers = [Answer(**answer) for report in reports for answer in report["answers"]]
        return Outcome.of(answers, sum(report["cpu_s"] for report in reports))
    finally:
        for client in clients:
            client.kill()
            client.communicate()


def _tell(client: "subprocess.Popen[str]", line: str) -> None:
    assert client.stdin is not None
    client.stdin.write(line + "\n")
    client.stdin.flush()


def _hear(client: "subprocess.Popen[str]") -> str:
    assert client.stdout is not None
    line = client.stdout.readline()
    if not line:
        raise RuntimeError("a client process ended early; see its stderr")
    return line


class _Stream(asyncio.Protocol):
    """One connection with one request on it; `done` gets the Answer."""

    def __init__(self, request: bytes, output_tokens: int) -> None:
        self._request = request
        self._output_tokens = output_tokens
        self._transport: asyncio.Transport | None = None
        self._sent_s = 0.0
        self._events_s: list[float] = []
        self._tail = b""
        self._last = bytearray()  # the newest bytes: the head of the answer, then the usage chunk
        self.done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's is one in all but name

    def send(self) -> None:
        assert self._transport is not None
        self._sent_s = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        window = self._tail + data
        if (count := window.count(_EVENT)) > 0:
            self._events_s.extend([now] * count)
        self._tail = window[1 - len(_EVENT) :]
        last = self._last
        last += data
        if len(last) > 65536:
            del last[:-2048]
        if last.endswith(b"\r\n0\r\n\r\n"):
            self._end(now)
        elif not self._events_s and bytes(last[9:12]) not in (b"", b"200") and not self.done.done():
            self.done.set_exception(RuntimeError(f"the request was refused: {bytes(last[:600])!r}"))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(RuntimeError(f"the connection was closed: {bytes(self._last[-400:])!r}"))

    def _end(self, now: float) -> None:
        assert self._transport is not None
        self._transport.close()
        marker = self._last.rfind(b'"completion_tokens":')
        tokens = int(bytes(self._last[marker + 20 : marker + 32]).split(b",")[0].split(b"}")[0]) if marker >= 0 else 0
        if tokens != self._output_tokens:
            text = bytes(self._last[-600:])
            self.done.set_exception(RuntimeError(f"asked for {self._output_tokens} tokens, got {tokens}: {text!r}"))
            return
        self.done.set_result(
            Answer(self._sent_s, tuple(self._events_s[:-1]), now, tokens)
        )  # the last event is the usage chunk


async def _connect(
    url: str, model: str, prompts: list[list[int]], output_tokens: int, headers: dict[str, str]
) -> list[_Stream]:
    loop = asyncio.get_running_loop()
    streams: list[_Stream] = []
    for prompt in prompts:
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        stream = _Stream(_request(body, headers), output_tokens)
        if url.startswith("unix:"):
            await loop.create_unix_connection(lambda stream=stream: stream, url.removeprefix("unix:"))  # type: ignore[misc]
        else:
            split = urlsplit(url)
            await loop.create_connection(lambda stream=stream: stream, split.hostname or "", split.port or 80)  # type: ignore[misc]
        streams.append(stream)
    return streams


def _request(body: dict[str, object], headers: dict[str, str]) -> bytes:
    content = json.dumps(body).encode()
    extra = "".join(f"{key}: {value}\r\n" for key, value in headers.items())
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{extra}Content-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


async def _run_all(streams: list[_Stream]) -> list[Answer]:
    for stream in streams:
        stream.send()
    return list(await asyncio.gather(*(stream.done for stream in streams)))


async def _serve_job() -> None:
    job = json.loads(sys.stdin.readline())
    streams = await _connect(job["url"], job["model"], job["prompts"], job["output_tokens"], job["headers"])
    print("connected", flush=True)
    sys.stdin.readline()
    started_s = time.process_time()
    answers = await _run_all(streams)
    spent_s = time.process_time() - started_s
    print(json.dumps({"cpu_s": spent_s, "answers": [asdict(answer) for answer in answers]}), flush=True)


if __name__ == "__main__":
    uvloop.run(_serve_job())
