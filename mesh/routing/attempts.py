"""Forwards one request in as many attempts as the retry policy allows; gRPC and HTTP only carry the bytes.

    with router.attempts(request) as attempts:
        async for attempt in attempts:
            attempt.failure = await forward_to(attempt.target)

The loop ends after the first attempt whose failure is None or may not be retried. The last target counts as in use until the `with` block ends.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from enum import StrEnum
from types import TracebackType
from typing import Protocol

import msgspec

from mesh.errors import NotFound
from mesh.routing.retry_policy import Failure, RetryBudget
from mesh.types import Target


class RoutingRequest(msgspec.Struct, frozen=True):
    """What routing needs of a request.

    `name`: the caller's name for the model, followed if it moves to another model. `local_only`: another pod forwarded the request to this one.
    `time_left_s`: returns the seconds until the deadline, None without one.
    """

    name: str
    model_id: str
    prefix_hash: str = ""
    local_only: bool = False
    time_left_s: Callable[[], float | None] = lambda: None


class Outcome(StrEnum):
    """What an attempt says about its copy."""

    ANSWERED = "answered"
    FAILED = "failed"
    ABANDONED = "abandoned"  # the caller left, or its deadline passed, before the first byte
    UNKNOWN = "unknown"  # the failure does not concern the copy's health


class Attempt(msgspec.Struct, eq=False):
    """One target. The carrier sets `failure`, and calls `begin_response` with the first part of the response.

    `is_committed`: a part of the response has reached the caller, or the request cannot be repeated.
    """

    model_id: str
    target: Target
    failure: Failure | None = None
    is_committed: bool = False
    is_lost: bool = False
    started_s: float = msgspec.field(default_factory=time.monotonic)
    first_byte_s: float | None = None
    has_ended: bool = False
    _scope: asyncio.Timeout | None = None
    _cancel: Callable[[], object] | None = None

    def begin_response(self) -> None:
        """Note that the first part of the response has arrived, which goes to the caller."""
        self.is_committed = True
        if self.first_byte_s is None:
            self.first_byte_s = time.monotonic()

    @contextlib.asynccontextmanager
    async def until_lost(self) -> AsyncIterator[None]:
        """Raise TimeoutError in the body when the target is lost."""
        async with asyncio.timeout(0 if self.is_lost else None) as scope:
            self._scope = scope
            try:
                yield
            finally:
                self._scope = None

    def cancel_when_lost(self, cancel: Callable[[], object]) -> None:
        """Call `cancel` when the target is lost, or now if it is lost already. It costs less than `until_lost`."""
        self._cancel = cancel
        if self.is_lost:
            cancel()

    def lose(self) -> None:
        """End the carrier's wait, because the target does not answer any more."""
        self.is_lost = True
        if self._cancel is not None:
            self._cancel()
        if self._scope is not None and self._scope.when() is None:
            self._scope.reschedule(asyncio.get_running_loop().time())

    @property
    def outcome(self) -> Outcome:
        if self.failure is Failure.UNAVAILABLE or self.is_lost:
            return Outcome.FAILED
        if self.failure is not None:
            return Outcome.UNKNOWN
        if self.first_byte_s is not None:
            return Outcome.ANSWERED
        return Outcome.UNKNOWN if self.has_ended else Outcome.ABANDONED

    @property
    def waited_s(self) -> float:
        """The seconds until the first byte, or until now."""
        return (self.first_byte_s if self.first_byte_s is not None else time.monotonic()) - self.started_s


class Routes(Protocol):
    """The router, as attempts use it."""

    async def route(
        self, model_id: str, *, deadline_s: float | None, prefix_hash: str, exclude: frozenset[str], local_only: bool
    ) -> Target: ...

    def begin(self, attempt: Attempt) -> None: ...

    def end(self, attempt: Attempt) -> None: ...

    def mark_lost(self, model_id: str, target: Target) -> None: ...

    async def successor(self, name: str, model_id: str) -> str | None: ...


class Attempts:
    """Iterates over attempts and owns what they share: the retry budget, the in-flight count and the concrete model."""

    __slots__ = ("_attempt", "_budget", "_request", "_routes", "is_waiting", "model_id")

    def __init__(self, routes: Routes, request: RoutingRequest) -> None:
        self._routes = routes
        self._request = request
        self._budget = RetryBudget(local_only=request.local_only)
        self._attempt: Attempt | None = None
        self.model_id = request.model_id
        self.is_waiting = False  # no copy is chosen yet

    def __enter__(self) -> "Attempts":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def __aiter__(self) -> "Attempts":
        return self

    async def __anext__(self) -> Attempt:
        """Raise StopAsyncIteration when no further attempt is due, else whatever `CopyRouter.route` raises."""
        if self._attempt is not None:
            self._give_up(self._attempt)
        self.is_waiting = True
        target = await self._route()
        self.is_waiting = False
        self._attempt = Attempt(self.model_id, target)
        self._routes.begin(self._attempt)
        return self._attempt

    def _give_up(self, attempt: Attempt) -> None:
        """Prepare for the next attempt. Raises StopAsyncIteration if this one was the last; its target then stays in use."""
        attempt.has_ended = True
        if attempt.failure is None or attempt.is_committed:
            raise StopAsyncIteration
        budget = self._budget.after(attempt.failure, attempt.target.instance_id)
        if budget is None:
            raise StopAsyncIteration
        self._budget = budget
        if attempt.failure is Failure.MODEL_LOST:
            self._routes.mark_lost(attempt.model_id, attempt.target)
        self._release()

    async def _route(self) -> Target:
        while True:
            try:
                return await self._routes.route(
                    self.model_id,
                    deadline_s=self._request.time_left_s(),
                    prefix_hash=self._request.prefix_hash,
                    exclude=self._budget.exclude,
                    local_only=self._request.local_only,
                )
            except NotFound:
                # The name may have moved to another model since it was resolved.
                budget = self._budget.after_move()
                successor = await self._routes.successor(self._request.name, self.model_id) if budget else None
                if budget is None or successor is None:
                    raise
                self._budget, self.model_id = budget, successor

    def _release(self) -> None:
        if self._attempt is not None:
            self._routes.end(self._attempt)
            self._attempt = None
