"""The faults of bench.chaos, how each is mended, and when each comes in a run that has them all."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bench.fleet import Fleet
from bench.ledger import SLOW_S, Call, Outcome

CALM = "calm"
_CALM_S = 8.0  # before each fault
_VICTIM = 2
_LONG_S = 30.0  # longer than a pod's session


@dataclass(frozen=True, slots=True)
class Fault:
    """`lasts_s`: from the break until the repair. `with_envoy`, `with_network`: where it can happen. `spoils_model`: a model is called that cannot be loaded."""

    name: str
    cause: Callable[[Fleet], None]
    mend: Callable[[Fleet], None]
    lasts_s: float = 15.0
    with_envoy: bool = False
    with_network: bool = False
    spoils_model: bool = False


def _nothing(_: Fleet) -> None:
    pass


def _cut(mesh: Fleet) -> None:
    assert mesh.network is not None
    mesh.network.cut(_VICTIM)


def _mend_network(mesh: Fleet) -> None:
    assert mesh.network is not None
    mesh.network.mend(_VICTIM)


FAULTS: Sequence[Fault] = (
    Fault("a pod is killed (SIGKILL)", lambda mesh: mesh.kill(_VICTIM), lambda mesh: mesh.join(_VICTIM)),
    Fault(
        "a pod freezes, its runtime does not",
        lambda mesh: mesh.freeze(_VICTIM, with_runtime=False),
        lambda mesh: mesh.thaw(_VICTIM, with_runtime=False),
    ),
    Fault(
        "a pod and its runtime freeze",
        lambda mesh: mesh.freeze(_VICTIM, with_runtime=True),
        lambda mesh: mesh.thaw(_VICTIM, with_runtime=True),
        lasts_s=_LONG_S,
    ),
    Fault(
        "a runtime freezes",
        lambda mesh: mesh.runtimes[_VICTIM].freeze(),
        lambda mesh: mesh.runtimes[_VICTIM].thaw(),
    ),
    Fault(
        "a runtime dies",
        lambda mesh: mesh.runtimes[_VICTIM].kill(),
        lambda mesh: mesh.runtimes[_VICTIM].start(),
    ),
    Fault(
        "a runtime answers no request",
        lambda mesh: mesh.runtimes[_VICTIM].toggle_answers(),
        lambda mesh: mesh.runtimes[_VICTIM].toggle_answers(),
    ),
    Fault("a pod is cut from its peers", _cut, _mend_network, with_network=True),
    Fault(
        "etcd is away",
        lambda mesh: mesh.etcd.kill(),
        lambda mesh: mesh.start_etcd(),
        lasts_s=_LONG_S,
    ),
    Fault("etcd is wiped", lambda mesh: mesh.wipe_etcd(), lambda mesh: mesh.restore_etcd()),
    Fault("a model that fails to load is called", _nothing, _nothing, spoils_model=True),
    Fault("a pod leaves (SIGTERM), a pod joins", lambda mesh: mesh.leave(_VICTIM), lambda mesh: mesh.join(_VICTIM)),
    Fault("a pod's mesh is killed", lambda mesh: mesh.kill_mesh(_VICTIM), _nothing, with_envoy=True),
    Fault("a pod's Envoy is killed", lambda mesh: mesh.kill_envoy(_VICTIM), _nothing, with_envoy=True),
)


@dataclass(frozen=True, slots=True)
class Window:
    """When a fault comes, when it is mended and when its effects must be over, in seconds since the start."""

    fault: Fault
    cause_s: float
    mend_s: float
    end_s: float


def possible(*, with_envoy: bool, with_network: bool) -> tuple[Fault, ...]:
    return tuple(fault for fault in FAULTS if with_envoy >= fault.with_envoy and with_network >= fault.with_network)


def schedule(faults: Sequence[Fault], seconds: float) -> tuple[Window, ...]:
    """Give each fault an equal time to recover from, after some seconds of calm. Raises ValueError if the run is too short."""
    recovery_s = (seconds - sum(_CALM_S + fault.lasts_s for fault in faults)) / len(faults)
    if recovery_s < _CALM_S:
        least_s = sum(2 * _CALM_S + fault.lasts_s for fault in faults)
        raise ValueError(f"{len(faults)} faults need {least_s / 60:.1f} minutes; give at least as many")
    windows, begin_s = [], 0.0
    for fault in faults:
        mend_s = begin_s + _CALM_S + fault.lasts_s
        windows.append(Window(fault, begin_s + _CALM_S, mend_s, mend_s + recovery_s))
        begin_s = mend_s + recovery_s
    return tuple(windows)


def by_fault(calls: Iterable[Call], windows: Sequence[Window]) -> dict[str, list[Call]]:
    """Divide a ledger: a call belongs to the first fault whose window it was in flight in, else to the calm between faults."""
    parts: dict[str, list[Call]] = {CALM: [], **{window.fault.name: [] for window in windows}}
    for call in calls:
        names = (
            window.fault.name for window in windows if call.sent_s < window.end_s and call.ended_s >= window.cause_s
        )
        parts[next(names, CALM)].append(call)
    return parts


def last_bad_s(calls: Iterable[Call], window: Window) -> float:
    """Return the seconds from the fault until the end of the last call that failed or took over 3 s; 0 if there was none."""
    bad = (call for call in calls if call.outcome != Outcome.OK or call.seconds > SLOW_S)
    return max((call.ended_s - window.cause_s for call in bad), default=0.0)
