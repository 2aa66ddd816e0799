"""Brings the results of steps from the device to the host, one step late: a ring on the device, a pinned twin and a copy stream."""

import time
from typing import Protocol

import torch

from runtime.engine.interfaces import StepOutput
from runtime.engine.model.run.input_buffers import RING_LINES
from runtime.engine.model.run.pooling import PooledRows
from runtime.ipc.messages import TokenLogprobs


class PendingLogprobs(Protocol):
    """Log-probabilities whose copy to the host is queued before the step's last event."""

    def generated(self) -> list[TokenLogprobs | None] | None: ...

    def prompt(self) -> dict[int, list[TokenLogprobs | None]] | None: ...


class StepLaunched:
    """A step that was launched (interfaces.Launched). On a CPU it is complete when it is constructed."""

    def __init__(
        self,
        tokens: torch.Tensor,
        logprobs: PendingLogprobs | None,
        pooled: PooledRows | None,
        events: "tuple[torch.cuda.Event, torch.cuda.Event, torch.cuda.Event] | None",
        host_us: float,
    ) -> None:
        self._tokens = tokens
        self._logprobs = logprobs
        self._pooled = pooled
        self._events = events
        self._device_us = host_us
        self._result: StepOutput | None = None

    def ready(self) -> bool:
        try:
            return self._events is None or bool(self._events[2].query())
        except RuntimeError:
            return True  # the device is lost, and `collect` raises its error

    def settle(self) -> None:
        """Read the output from the ring, waiting for it if necessary. The line may be used again afterwards."""
        if self._result is not None:
            return
        if self._events is not None:
            begin, end, copied = self._events
            copied.synchronize()
            self._device_us = begin.elapsed_time(end) * 1e3
            self._events = None
        job = self._logprobs
        self._result = StepOutput(
            self._tokens.tolist(),
            self._device_us,
            job.generated() if job is not None else None,
            job.prompt() if job is not None else None,
            self._pooled.by_row() if self._pooled is not None else None,
        )

    def collect(self) -> StepOutput:
        self.settle()
        assert self._result is not None
        return self._result


class ResultRing:
    """Lines of drawn tokens, used in turn."""

    def __init__(self, device: torch.device, max_rows: int) -> None:
        self.lines = torch.zeros((RING_LINES, max_rows), dtype=torch.int64, device=device)
        self._on_gpu = device.type == "cuda"
        self._host = (
            torch.zeros((RING_LINES, max_rows), dtype=torch.int64, pin_memory=True) if self._on_gpu else self.lines
        )
        self._copies = torch.cuda.Stream(device) if self._on_gpu else None
        self._users: list[StepLaunched | None] = [None] * RING_LINES
        self._turn = 0
        self._begin_event: torch.cuda.Event | None = None
        self._begin_s = 0.0

    def take_line(self) -> int:
        """Return a line for the next step. Waits only if RING_LINES steps are in flight."""
        line = self._turn
        self._turn = (line + 1) % RING_LINES
        user = self._users[line]
        if user is not None:
            user.settle()
        return line

    def begin(self) -> None:
        """Start to measure the step's device time."""
        if self._on_gpu:
            self._begin_event = torch.cuda.Event(enable_timing=True)
            self._begin_event.record()
        else:
            self._begin_s = time.perf_counter()

    def finish(
        self, line: int, num_samples: int, logprobs: PendingLogprobs | None, pooled: PooledRows | None = None
    ) -> StepLaunched:
        """Queue the copy of the line's first `num_samples` draws."""
        tokens = self._host[line, :num_samples]
        if self._copies is None or self._begin_event is None:
            launched = StepLaunched(tokens, logprobs, pooled, None, (time.perf_counter() - self._begin_s) * 1e6)
        else:
            end, copied = torch.cuda.Event(enable_timing=True), torch.cuda.Event()
            end.record()
            self._copies.wait_event(end)
            with torch.cuda.stream(self._copies):
                if num_samples:
                    tokens.copy_(self.lines[line, :num_samples], non_blocking=True)
                copied.record()
            launched = StepLaunched(tokens, logprobs, pooled, (self._begin_event, end, copied), 0.0)
        self._users[line] = launched
        return launched
