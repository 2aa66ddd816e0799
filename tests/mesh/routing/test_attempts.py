"""Attempts over scripted routes: targets, in-flight counts and the name that moves."""

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import NotFound, Unavailable
from mesh.routing.attempts import Attempt, Attempts, RoutingRequest
from mesh.routing.retry_policy import Failure, RetryBudget
from mesh.types import Target


@dataclass
class ScriptedRoutes:
    """Routes to the first copy that is not excluded, or to an excluded one if there is no other. `moved` maps a gone model to its successor."""

    copies: tuple[str, ...] = ("a", "b")
    moved: dict[str, str] = field(default_factory=dict)
    in_flight: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    routed: list[tuple[str, str]] = field(default_factory=list)
    begun: list[Attempt] = field(default_factory=list)
    ended: list[Attempt] = field(default_factory=list)

    async def route(
        self, model_id: str, *, deadline_s: float | None, prefix_hash: str, exclude: frozenset[str], local_only: bool
    ) -> Target:
        if model_id in self.moved:
            raise NotFound("it is gone", model=model_id)
        if not self.copies:
            raise Unavailable("no copy", model=model_id)
        allowed = [copy for copy in self.copies if copy not in exclude] or list(self.copies)
        self.in_flight[allowed[0]] += 1
        assert self.in_flight.total() == 1, "attempts overlap"
        self.routed.append((model_id, allowed[0]))
        return Target(allowed[0], False, "", "")

    def begin(self, attempt: Attempt) -> None:
        self.begun.append(attempt)

    def end(self, attempt: Attempt) -> None:
        self.in_flight[attempt.target.instance_id] -= 1
        self.ended.append(attempt)

    def mark_lost(self, model_id: str, target: Target) -> None:
        self.lost.append(target.instance_id)

    async def successor(self, name: str, model_id: str) -> str | None:
        return self.moved.get(model_id)


@dataclass(frozen=True)
class Ending:
    """How one attempt ends: with which failure, after a first byte or not, or in an exception."""

    failure: Failure | None
    is_committed: bool
    raises: bool


endings = st.lists(
    st.builds(Ending, st.none() | st.sampled_from(Failure), st.booleans(), st.booleans()), min_size=1, max_size=12
)


async def forward(routes: ScriptedRoutes, request: RoutingRequest, script: list[Ending]) -> list[Attempt]:
    """Make the attempts; after the script's end they succeed."""
    made: list[Attempt] = []
    with Attempts(routes, request) as attempts:
        async for attempt in attempts:
            ending = script[len(made)] if len(made) < len(script) else Ending(None, False, False)
            made.append(attempt)
            if ending.raises:
                raise ConnectionError
            attempt.failure, attempt.is_committed = ending.failure, ending.is_committed
        assert routes.in_flight.total() == 1, "the target counts until the response has been relayed"
    return made


@given(endings, st.booleans(), st.sampled_from([("a",), ("a", "b"), ("a", "b", "c")]))
def test_attempts_keep_to_the_policy(script: list[Ending], local_only: bool, copies: tuple[str, ...]) -> None:
    routes = ScriptedRoutes(copies)
    request = RoutingRequest("m", "m", local_only=local_only)
    made: list[Attempt] = []
    try:
        made = asyncio.run(forward(routes, request, script))
    except ConnectionError:
        assert any(ending.raises for ending in script)
    assert routes.in_flight.total() == 0
    assert routes.begun == routes.ended
    assert 1 <= len(routes.routed) <= RetryBudget(local_only=local_only).max_attempts
    for attempt, following in pairwise(made):
        assert attempt.failure is not None, "an answer is never asked for again"
        assert not attempt.is_committed, "nothing is repeated after the first byte"
        if attempt.failure is Failure.UNAVAILABLE and len(copies) > 1 and attempt is made[0]:
            assert following.target.instance_id != attempt.target.instance_id


async def test_attempts_follow_a_name_that_moves_once() -> None:
    routes = ScriptedRoutes(moved={"old": "new"})
    made = await forward(routes, RoutingRequest("m", "old"), [])
    assert [attempt.model_id for attempt in made] == ["new"]
    routes.moved["new"] = "newer"
    with pytest.raises(NotFound):
        await forward(routes, RoutingRequest("m", "old"), [])
    assert routes.in_flight.total() == 0


async def test_attempts_of_a_forwarded_request_do_not_follow_a_name() -> None:
    with pytest.raises(NotFound):
        await forward(ScriptedRoutes(moved={"old": "new"}), RoutingRequest("", "old", local_only=True), [])


async def test_attempts_mark_the_copy_that_lost_the_model() -> None:
    routes = ScriptedRoutes()
    await forward(routes, RoutingRequest("m", "m"), [Ending(Failure.MODEL_LOST, False, False)])
    assert (routes.lost, len(routes.routed)) == (["a"], 2)


async def test_attempts_wait_until_a_target_is_chosen() -> None:
    chosen = asyncio.Event()

    class SlowRoutes(ScriptedRoutes):
        async def route(
            self,
            model_id: str,
            *,
            deadline_s: float | None,
            prefix_hash: str,
            exclude: frozenset[str],
            local_only: bool,
        ) -> Target:
            await chosen.wait()
            return Target("a", False, "", "")

    with Attempts(SlowRoutes(), RoutingRequest("m", "m")) as attempts:
        seen = [attempts.is_waiting]
        first = asyncio.ensure_future(anext(attempts))
        await asyncio.sleep(0)
        seen.append(attempts.is_waiting)
        chosen.set()
        await first
        seen.append(attempts.is_waiting)
    assert seen == [False, True, False]
