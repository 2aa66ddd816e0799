"""Forwards one request in as many attempts as the retry policy allows; gRPC and HTTP only carry the bytes.

    with router.attempts(request) as attempts:
        async for attempt in attempts:
            attempt.failure = await forward_to(attempt.target)

The loop ends after the first attempt whose failure is None or may not be retried. The last target counts as in use until the `with` block ends.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

from mesh.errors import NotFound
from mesh.routing.retry_policy import Failure, RetryBudget
from mesh.types import Target


@dataclass(frozen=True, slots=True)
class RoutingRequest:
    """What routing needs of a request.

    `name`: the caller's name for the model, followed if it moves to another model. `local_only`: another pod forwarded the request to this one.
    `time_left_s`: returns the seconds until the deadline, None without one.
    """

    name: str
    model_id: str
    prefix_hash: str = ""
    local_only: bool = False
    time_left_s: Callable[[], float | None] = lambda: None


@dataclass(slots=True)
class Attempt:
    """One target. The carrier sets `failure`; `is_committed` once a part of the response has reached the caller or the request cannot be repeated."""

    model_id: str
    target: Target
    failure: Failure | None = field(default=None, init=False)
    is_committed: bool = field(default=False, init=False)


class Routes(Protocol):
    """The router, as attempts use it."""

    async def route(
        self, model_id: str, *, deadline_s: float | None, prefix_hash: str, exclude: frozenset[str], local_only: bool
    ) -> Target: ...

    def end(self, model_id: str, target: Target) -> None: ...

    def mark_lost(self, model_id: str, target: Target) -> None: ...

    async def successor(self, name: str, model_id: str) -> str | None: ...


class Attempts:
    """Iterates over attempts and owns what they share: the retry budget, the in-flight count and the concrete model."""

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
        return self._attempt

    def _give_up(self, attempt: Attempt) -> None:
        """Prepare for the next attempt. Raises StopAsyncIteration if this one was the last; its target then stays in use."""
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
            self._routes.end(self._attempt.model_id, self._attempt.target)
            self._attempt = None
