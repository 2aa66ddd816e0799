"""Breaks a mesh while it is called, and keeps a ledger of every call: `python -m bench.chaos [--envoy] [--seconds 45] [--rate 70] [SCENARIO …]`.

Four pods with room for 12 models each, 100 names by Zipf 0.9, loads of 0.5 s. Each scenario has a mesh of its own, whose fault comes after 10 s and
is not mended. With `--envoy` each pod has an Envoy in front, and there are more scenarios.

`python -m bench.chaos --minutes 10 [--envoy] [--rate 30]` is one run with all faults in sequence, each mended again, and one ledger of gRPC calls, HTTP
calls and HTTP streams.
"""

import argparse
import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import uvloop

from bench.caller import Caller, Traffic, zipf
from bench.faults import CALM, FAULTS, Fault, Window, by_fault, last_bad_s, possible, schedule
from bench.fleet import Fleet, fleet, register
from bench.ledger import Call, Outcome, Summary, judged, summarise
from tests.support.pod_network import may_make_namespaces, pod_network

_MODELS = tuple(f"model{number}" for number in range(100))
_FAILING = "failing"
_FAILING_SHARE = 0.1  # of the calls while it is called
# The streams' are error events after a first comment: of the call that waited for the load, and of later ones.
_REFUSALS = ("INTERNAL", "HTTP 424", "STREAM internal", "STREAM model_not_found")
_FAULT_AT_S = 10.0
_COLUMNS = "calls | failed | no answer | wrong | twice | hung | over 3 s | p50 | p95 | longest | failures"


def _without_etcd(mesh: Fleet, seconds: float) -> None:
    mesh.etcd.kill()
    time.sleep(seconds)
    mesh.etcd.start()


SCENARIOS: Mapping[str, Callable[[Fleet], None]] = {
    "nothing breaks": lambda _: None,
    **{fault.name: fault.cause for fault in FAULTS if not (fault.with_network or fault.spoils_model)},
    "etcd is away for 10 s": lambda mesh: _without_etcd(mesh, 10.0),
    "etcd is away for 60 s": lambda mesh: _without_etcd(mesh, 60.0),
}
_ENVOY_ONLY = {fault.name for fault in FAULTS if fault.with_envoy}


async def _break(mesh: Fleet, fault: Callable[[Fleet], None]) -> None:
    await asyncio.sleep(_FAULT_AT_S)
    await asyncio.to_thread(fault, mesh)


async def _call(mesh: Fleet, traffic: Traffic, fault: Callable[[Fleet], None]) -> list[Call]:
    breaking = asyncio.create_task(_break(mesh, fault))
    ledger = await Caller(mesh.pods).run(traffic)
    await breaking
    return ledger


def run(name: str, seconds: float, rate: float, *, with_envoy: bool) -> Summary:
    """Run one scenario."""
    with (
        tempfile.TemporaryDirectory() as folder,
        fleet(Path(folder), num_pods=4, models_per_pod=12, load_s=0.5, with_envoy=with_envoy) as mesh,
    ):
        uvloop.run(register(mesh.pods[0], _MODELS))
        traffic = Traffic(_MODELS, zipf(len(_MODELS), 0.9), rate, seconds)
        return summarise(uvloop.run(_call(mesh, traffic, SCENARIOS[name])))


async def _break_and_mend(mesh: Fleet, windows: Sequence[Window]) -> None:
    started_s = time.monotonic()
    for window in windows:
        for at_s, act in ((window.cause_s, window.fault.cause), (window.mend_s, window.fault.mend)):
            await asyncio.sleep(max(0.0, started_s + at_s - time.monotonic()))
            await asyncio.to_thread(act, mesh)


async def _call_through_faults(mesh: Fleet, traffic: Traffic, windows: Sequence[Window]) -> list[Call]:
    breaking = asyncio.create_task(_break_and_mend(mesh, windows))
    ledger = await Caller(mesh.pods).run(traffic)
    await breaking
    return ledger


def weights_with_failing(windows: Sequence[Window]) -> Callable[[float], Sequence[float]]:
    """Return weights of the models and, last, of the one that fails to load, which is called in some windows only."""
    steady = list(zipf(len(_MODELS), 0.9)(0.0))
    failing = sum(steady) * _FAILING_SHARE / (1 - _FAILING_SHARE)

    def weights(at_s: float) -> Sequence[float]:
        is_called = any(window.fault.spoils_model and window.cause_s <= at_s < window.mend_s for window in windows)
        return [*steady, failing if is_called else 0.0]

    return weights


def run_all(
    faults: Sequence[Fault], seconds: float, rate: float, *, with_envoy: bool, is_isolated: bool, keep_in: Path | None
) -> None:
    """Run all faults in sequence and print what each did to the calls. Raises ValueError if the time does not suffice.

    `keep_in`: a folder for the ledger and the logs.
    """
    windows = schedule(faults, seconds)
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(pod_network(4)) if is_isolated else None
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True)))
        switches = {"fail": {f"/{_FAILING}": "its weights are damaged"}, "chunk_s": 0.05}
        mesh = stack.enter_context(
            fleet(
                folder,
                num_pods=4,
                models_per_pod=12,
                load_s=0.5,
                with_envoy=with_envoy,
                network=network,
                switches=switches,
            )
        )
        models = (*_MODELS, _FAILING)
        uvloop.run(register(mesh.pods[0], models))
        traffic = Traffic(models, weights_with_failing(windows), rate, seconds, with_http=True)
        print(f"load average at the start: {os.getloadavg()[0]:.1f}", flush=True)
        ledger = uvloop.run(_call_through_faults(mesh, traffic, windows))
        print(f"load average at the end: {os.getloadavg()[0]:.1f}", flush=True)
        if keep_in is not None:
            _keep(folder, keep_in, ledger)
    print(f"fault | {_COLUMNS} | mended after | last failed or slow call after")
    parts = by_fault(ledger, windows)
    _print(CALM, _judge(parts[CALM]))
    for window in windows:
        calls = _judge(parts[window.fault.name])
        _print(window.fault.name, calls, f"{window.fault.lasts_s:.0f} s", f"{last_bad_s(calls, window):.1f} s")
    _print("all", _judge(ledger))


def _keep(logs: Path, folder: Path, ledger: Sequence[Call]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for log in logs.glob("*.log"):
        shutil.copy(log, folder)
    (folder / "ledger.jsonl").write_bytes(b"".join(msgspec.json.encode(call) + b"\n" for call in ledger))


def _judge(calls: Sequence[Call]) -> list[Call]:
    return [replace(call, outcome=judged(call, {_FAILING}, _REFUSALS)) for call in calls]


def _row(found: Summary) -> list[str]:
    failures = ", ".join(f"{outcome} {count}" for outcome, count in sorted(found.outcomes.items()) if outcome != "OK")
    return [
        str(found.num_calls),
        str(found.num_failed),
        *(str(found.of(kind)) for kind in (Outcome.NO_ANSWER, Outcome.WRONG, Outcome.TWICE, Outcome.HUNG)),
        str(found.over_3s),
        f"{found.p50_s * 1000:.0f} ms",
        f"{found.p95_s:.2f} s",
        f"{found.max_s:.1f} s",
        failures or "none",
    ]


def _print(name: str, calls: Sequence[Call], *more: str) -> None:
    print(" | ".join((name, *_row(summarise(calls)), *more)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.chaos")
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", default=[])
    parser.add_argument("--envoy", action="store_true", help="call the pods through an Envoy each")
    parser.add_argument("--seconds", type=float, default=45.0, help="of each scenario")
    parser.add_argument("--minutes", type=float, help="run all faults in sequence, in so many minutes")
    parser.add_argument("--rate", type=float, help="calls a second; 70, or 30 with --minutes")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the ledger and the logs of --minutes there")
    parser.add_argument("--isolated", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.minutes is not None:
        if not arguments.isolated and may_make_namespaces():
            command = (sys.executable, "-m", "bench.chaos", *sys.argv[1:], "--isolated")
            os.execvp("unshare", ("unshare", "-rn", *command))
        faults = possible(with_envoy=arguments.envoy, with_network=arguments.isolated)
        try:
            run_all(
                faults,
                60 * arguments.minutes,
                arguments.rate or 30.0,
                with_envoy=arguments.envoy,
                is_isolated=arguments.isolated,
                keep_in=arguments.keep,
            )
        except ValueError as error:
            parser.error(str(error))
        return
    known = [name for name in SCENARIOS if arguments.envoy or name not in _ENVOY_ONLY]
    if unknown := set(arguments.scenarios) - set(known):
        parser.error(f"{', '.join(sorted(unknown))}: the scenarios are {', '.join(known)}")
    print(f"scenario | {_COLUMNS}")
    for name in arguments.scenarios or known:
        found = run(name, arguments.seconds, arguments.rate or 70.0, with_envoy=arguments.envoy)
        print(" | ".join((name, *_row(found))), flush=True)


if __name__ == "__main__":
    main()
