"""Calls a mesh at a fixed rate and keeps a ledger: each call carries its own number, and must be answered with it once.

The caller spreads its calls over the pods that answer `/readyz`, as a Kubernetes service does, and sends a call to the next pod after UNAVAILABLE,
HTTP 503 or a lost connection, if nothing was answered yet.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import aiohttp
import grpc
import grpc.aio

from bench.fleet import METHOD
from bench.ledger import Call, Outcome
from tests.support.mesh_process import MeshProcess

_PROBE_EVERY_S = 0.5
_PROBE_TIMEOUT_S = 0.5
_HUNG_S = 5.0  # beyond the deadline
_CHUNKS = 3
_TRY_ELSEWHERE = ("UNAVAILABLE", "HTTP 503")
_CHANNEL = (
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


@dataclass(frozen=True)
class Traffic:
    """`weights` returns the probability of each model at a time since the start. `with_http`: half of the calls are HTTP, every other one a stream."""

    models: Sequence[str]
    weights: Callable[[float], Sequence[float]]
    rate: float
    seconds: float
    deadline_s: float = 15.0
    seed: int = 0
    with_http: bool = False


def zipf(
    num_models: int, exponent: float, *, shuffled_every_s: float | None = None, seed: int = 0
) -> Callable[[float], Sequence[float]]:
    """Return weights by Zipf's law. With `shuffled_every_s` the models change places at random."""
    ordered = [1 / (rank + 1) ** exponent for rank in range(num_models)]

    def weights(at_s: float) -> Sequence[float]:
        if shuffled_every_s is None or at_s < shuffled_every_s:
            return ordered
        mixed = list(ordered)
        random.Random(f"{seed}/{int(at_s / shuffled_every_s)}").shuffle(mixed)
        return mixed

    return weights


@dataclass(slots=True)
class _Sending:
    """A call on its way. `pods`: those that it was sent to."""

    number: int
    model: str
    due_s: float
    pods: list[int] = field(default_factory=list)


class Caller:
    """Sends traffic to a fleet. Afterwards `ledger` has one line for each call."""

    def __init__(self, pods: Sequence[MeshProcess]) -> None:
        self._pods = pods
        self._ledger: list[Call] = []
        self._ready = list(range(len(pods)))
        self._channels: list[grpc.aio.Channel] = []

    async def run(self, traffic: Traffic) -> list[Call]:
        self._channels = [grpc.aio.insecure_channel(pod.grpc_address, _CHANNEL) for pod in self._pods]
        rng = random.Random(traffic.seed)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            probes = [asyncio.create_task(self._probe(session, number)) for number in range(len(self._pods))]
            started_s, calls = time.monotonic(), dict[asyncio.Task[None], _Sending]()
            for number in range(round(traffic.rate * traffic.seconds)):
                due_s = number / traffic.rate
                await asyncio.sleep(max(0.0, started_s + due_s - time.monotonic()))
                sending = _Sending(number, rng.choices(traffic.models, traffic.weights(due_s))[0], due_s)
                calls[asyncio.create_task(self._call(session, sending, traffic))] = sending
            await asyncio.wait(calls, timeout=traffic.deadline_s + _HUNG_S)
            hung = [sending for task, sending in calls.items() if not task.done()]
            for task in (*probes, *calls):
                task.cancel()
            await asyncio.gather(*probes, *calls, return_exceptions=True)
        for channel in self._channels:
            await channel.close()
        for sending in hung:
            self._enter(sending, traffic.deadline_s + _HUNG_S, Outcome.HUNG)
        return self._ledger

    def _enter(self, sending: _Sending, seconds: float, outcome: str) -> None:
        self._ledger.append(Call(sending.number, sending.model, sending.due_s, seconds, outcome, tuple(sending.pods)))

    async def _probe(self, session: aiohttp.ClientSession, number: int) -> None:
        while True:
            try:
                timeout = aiohttp.ClientTimeout(total=_PROBE_TIMEOUT_S)
                async with session.get(f"{self._pods[number].url}/readyz", timeout=timeout) as answer:
                    is_ready = answer.status == 200
            except (aiohttp.ClientError, OSError):
                is_ready = False
            if is_ready != (number in self._ready):
                self._ready = sorted({*self._ready, number} if is_ready else set(self._ready) - {number})
            await asyncio.sleep(_PROBE_EVERY_S)

    async def _call(self, session: aiohttp.ClientSession, sending: _Sending, traffic: Traffic) -> None:
        begun_s = time.monotonic()
        give_up_s = begun_s + traffic.deadline_s
        outcome = _TRY_ELSEWHERE[0]
        while outcome in _TRY_ELSEWHERE and (left_s := give_up_s - time.monotonic()) > 0:
            ready = [pod for pod in self._ready if pod not in sending.pods] or self._ready
            if not ready or len(sending.pods) == len(self._pods):
                break
            sending.pods.append(ready[sending.number % len(ready)])
            try:
                # The gRPC call has the same deadline, which the pods see. That one is expected to come first.
                async with asyncio.timeout(left_s + 1.0):
                    if traffic.with_http and sending.number % 4 >= 2:
                        outcome = await self._post(session, sending, left_s, is_stream=sending.number % 4 == 3)
                    else:
                        outcome = await self._send(sending, left_s)
            except TimeoutError:
                outcome = Outcome.NO_ANSWER
        self._enter(sending, time.monotonic() - begun_s, outcome)

    async def _send(self, sending: _Sending, timeout_s: float) -> str:
        """Call by gRPC. The answer is read as a stream, which would show a second one."""
        message = f"call {sending.number}".encode()
        call: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = self._channels[sending.pods[-1]].unary_stream(METHOD)
        answers: list[bytes] = []
        try:
            answering = call(message, metadata=(("mm-model-id", sending.model),), timeout=timeout_s)
            async for answer in answering:
                answers.append(answer)  # noqa: PERF401  those before an error count
        except grpc.aio.AioRpcError as error:
            if answers:
                return Outcome.CUT
            is_late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            return Outcome.NO_ANSWER if is_late else error.code().name
        return _outcome(answers, [message])

    async def _post(
        self, session: aiohttp.ClientSession, sending: _Sending, timeout_s: float, *, is_stream: bool
    ) -> str:
        """Call by HTTP. A stream's answers are its events, whose order shows a missing or repeated one."""
        body = {"model": sending.model, "stream": is_stream, "chunks": _CHUNKS}
        number = f"call-{sending.number}"
        has_begun = False
        try:
            async with session.post(
                f"{self._pods[sending.pods[-1]].url}/v1/completions",
                json=body,
                headers={"X-Request-Id": number},
                timeout=aiohttp.ClientTimeout(total=timeout_s),
            ) as answer:
                if answer.status != 200:
                    return f"HTTP {answer.status}"
                has_begun = is_stream
                text = await answer.text()
        except TimeoutError:
            return Outcome.NO_ANSWER
        except (aiohttp.ClientError, OSError):
            return Outcome.CUT if has_begun else _TRY_ELSEWHERE[0]
        if not is_stream:
            found = json.loads(text)
            return _outcome([f"{found['answer']} {found['id']}"], [f"{sending.model} {number}"])
        events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        if events and (error := _error_of(events[-1])):
            return error
        expected = [json.dumps({"model": sending.model, "n": index}) for index in range(_CHUNKS)]
        return _outcome(events, [*expected, "[DONE]"])


def _error_of(event: str) -> str:
    """Return the outcome of a stream that ended with an error event; empty for other events."""
    if event == "[DONE]" or (error := json.loads(event).get("error")) is None:
        return ""
    return f"STREAM {error.get('code') or error.get('type')}"


def _outcome(answers: Sequence[object], expected: Sequence[object]) -> Outcome:
    if list(answers) == list(expected):
        return Outcome.OK
    return Outcome.TWICE if len(answers) > len(expected) else Outcome.WRONG
