"""Controls the workers of a pod: sends them the names that they may carry, and collects what they have counted."""

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from common.changes import Changes
from mesh.envoy.interfaces import ClusterFigures, EnvoyFigures, KeyCalls
from mesh.envoy.plan import Cluster, Role
from mesh.workers.link import Link
from mesh.workers.messages import (
    Ask,
    CarriedCopy,
    Confirmed,
    CopyCalls,
    Figures,
    Leave,
    Listening,
    Lose,
    Start,
    Table,
    ToControl,
)

logger = logging.getLogger(__name__)

_ANSWER_S = 5.0  # a worker that is silent for longer hangs


@dataclass(eq=False, slots=True)
class _Session:
    """One worker. `kill` ends its process. `asked`: the figures that are awaited, by number."""

    link: Link[ToControl]
    kill: Callable[[], None]
    is_listening: bool = False
    confirmed: int = 0
    copies: Mapping[str, CopyCalls] = field(default_factory=dict)
    asked: dict[int, asyncio.Future[None]] = field(default_factory=dict)


class WorkerControl:
    """Implements ControlStream and EnvoyStats of mesh.envoy.interfaces for workers, which carry the calls of this pod's own copies.

    A worker that does not answer is killed: its table may be out of date, and its calls are unknown. `answer_s`: the longest wait for an answer.
    """

    def __init__(
        self, *, is_foreign: Callable[[], bool], logs_requests: Callable[[], bool], answer_s: float = _ANSWER_S
    ) -> None:
        self._answer_s = answer_s
        self._is_foreign = is_foreign
        self._logs_requests = logs_requests
        self._sessions: set[_Session] = set()
        self._carried: dict[str, CarriedCopy] = {}
        self._settings = (False, False)
        self._generation = 1
        self._is_leaving = False
        self._numbers = itertools.count(1)
        self._begun: Counter[str] = Counter()
        self._keys: Counter[KeyCalls] = Counter()
        self._changes = Changes()

    @property
    def num_listening(self) -> int:
        return sum(session.is_listening for session in self._sessions)

    async def serve(self, link: Link[ToControl], start: Start, kill: Callable[[], None]) -> bool:
        """Control one worker until it ends, and return whether it has listened."""
        session = _Session(link, kill)
        self._sessions.add(session)
        try:
            link.send(start)
            async for message in link.messages():
                self._received(session, message)
        finally:
            link.close()
            self._sessions.discard(session)
            for answered in session.asked.values():
                answered.set_result(None)
            self._changes.notify()
        return session.is_listening

    def _received(self, session: _Session, message: ToControl) -> None:
        match message:
            case Listening():
                session.is_listening = True
                session.link.send(self._table(self._carried, ()))
                if self._is_leaving:
                    session.link.send(Leave())
            case Confirmed(generation):
                session.confirmed = generation
            case Figures(number, copies, keys):
                session.copies = copies
                for stat_name, calls in copies.items():
                    self._begun[stat_name] += calls.begun
                for ended in keys:
                    self._keys[KeyCalls(ended.key, ended.carrier, ended.code)] += ended.count
                if (answered := session.asked.pop(number, None)) is not None:
                    answered.set_result(None)
        self._changes.notify()

    async def wait(self) -> None:
        """Return when a worker has begun to listen, has answered or has ended."""
        await self._changes.wait()

    def publish(self, changed: Mapping[str, Cluster], removed: Iterable[str]) -> int:
        gone = {name for name in removed if name in self._carried}
        fresh: dict[str, CarriedCopy] = {}
        for name, cluster in changed.items():
            if cluster.role is not Role.LOCAL or cluster.from_peers:
                gone |= self._carried.keys() & {name}
                continue
            copy = CarriedCopy(cluster.carrier, name.partition("/")[2], cluster.model_id, cluster.stat_name)
            if self._carried.get(name) != copy:
                fresh[name] = copy
        settings = (self._is_foreign(), self._logs_requests())
        if gone or fresh or settings != self._settings:
            self._settings = settings
            for name in gone:
                del self._carried[name]
            self._carried |= fresh
            self._generation += 1
            self._send(self._table(fresh, tuple(gone)))
        return self._generation

    async def confirmed(self, generation: int) -> bool:
        try:
            async with asyncio.timeout(self._answer_s):
                while self._behind(generation):
                    await self._changes.wait()
        except TimeoutError:
            for session in self._behind(generation):
                self._kill(session, "has not confirmed a change of its names")
        return True

    async def figures(self) -> EnvoyFigures:
        number = next(self._numbers)
        asked = {
            session: asyncio.get_running_loop().create_future() for session in self._sessions if session.is_listening
        }
        for session, answered in asked.items():
            session.asked[number] = answered
            session.link.send(Ask(number))
        if asked:
            await asyncio.wait(asked.values(), timeout=self._answer_s)
        for session, answered in asked.items():
            if not answered.done():
                self._kill(session, "does not report its calls")
        return EnvoyFigures(self._clusters(), dict(self._keys))

    def lose(self, *, committed: bool) -> None:
        """End the workers' calls to the runtime, which does not answer any more."""
        self._send(Lose(committed))

    def leave(self) -> None:
        """Have all workers end with their last calls, those that begin to listen later included."""
        self._is_leaving = True
        self._send(Leave())

    def kill(self) -> None:
        """End all workers at once."""
        for session in tuple(self._sessions):
            self._sessions.discard(session)
            session.kill()

    def _clusters(self) -> dict[str, ClusterFigures]:
        sessions = [session.copies for session in self._sessions]
        known = {copy.stat_name for copy in self._carried.values()}.union(*sessions)
        found = {}
        for stat_name in {*known, *self._begun}:
            each = [calls for copies in sessions if (calls := copies.get(stat_name)) is not None]
            latencies = [calls.latency_s for calls in each if calls.latency_s]
            begun, active = self._begun[stat_name], sum(calls.active for calls in each)
            found[stat_name] = ClusterFigures(
                begun,
                active,
                begun - active,  # each worker watches by itself whether the runtime answers
                sum(latencies) / len(latencies) if latencies else 0.0,
            )
            if stat_name not in known:
                del self._begun[stat_name]  # with this report, nothing remains to be said of it
        return found

    def _table(self, changed: Mapping[str, CarriedCopy], removed: tuple[str, ...]) -> Table:
        return Table(self._generation, dict(changed), removed, *self._settings)

    def _send(self, message: Table | Lose | Leave) -> None:
        for session in self._sessions:
            if session.is_listening:
                session.link.send(message)

    def _behind(self, generation: int) -> list[_Session]:
        return [session for session in self._sessions if session.is_listening and session.confirmed < generation]

    def _kill(self, session: _Session, reason: str) -> None:
        logger.error("a worker %s within %g s; killing it", reason, self._answer_s)
        self._sessions.discard(session)
        session.kill()
