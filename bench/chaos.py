"""Breaks a mesh while it is called, and keeps a ledger of every call: `python -m bench.chaos [--envoy] [--seconds 45] [--rate 70] [SCENARIO …]`.

Four pods with room for 12 models each, 100 names by Zipf 0.9, loads of 0.5 s. The fault comes after 10 s. With `--envoy` each pod has an Envoy in front,
and there are two more scenarios.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import uvloop

from bench.fleet import Call, Caller, Fleet, Summary, Traffic, fleet, register, summarise, zipf

_MODELS = [f"model{number}" for number in range(100)]
_FAULT_AT_S = 10.0
_VICTIM = 2


def _nothing(_: Fleet) -> None:
    pass


def _wipe(mesh: Fleet) -> None:
    mesh.etcd.wipe()
    mesh.etcd.start()


def _without_etcd(mesh: Fleet, seconds: float) -> None:
    mesh.etcd.kill()
    time.sleep(seconds)
    mesh.etcd.start()


SCENARIOS: Mapping[str, Callable[[Fleet], None]] = {
    "nothing breaks": _nothing,
    "a pod is killed": lambda mesh: mesh.pods[_VICTIM].kill(),
    "a pod and its runtime freeze": lambda mesh: mesh.freeze(_VICTIM, with_runtime=True),
    "a pod freezes": lambda mesh: mesh.freeze(_VICTIM, with_runtime=False),
    "a runtime freezes": lambda mesh: mesh.freeze_runtime(_VICTIM),
    "a runtime dies": lambda mesh: mesh.kill_runtime(_VICTIM),
    "a runtime answers no request": lambda mesh: mesh.mute_runtime(_VICTIM),
    "etcd is away for 10 s": lambda mesh: _without_etcd(mesh, 10.0),
    "etcd is away for 60 s": lambda mesh: _without_etcd(mesh, 60.0),
    "etcd is wiped": _wipe,
}


ENVOY_SCENARIOS: Mapping[str, Callable[[Fleet], None]] = {
    "a pod's mesh is killed": lambda mesh: mesh.kill_mesh(_VICTIM),
    "a pod's Envoy is killed": lambda mesh: mesh.kill_envoy(_VICTIM),
}


async def _break(mesh: Fleet, fault: Callable[[Fleet], None]) -> None:
    await asyncio.sleep(_FAULT_AT_S)
    await asyncio.to_thread(fault, mesh)


async def _call(mesh: Fleet, traffic: Traffic, fault: Callable[[Fleet], None]) -> list[Call]:
    breaking = asyncio.create_task(_break(mesh, fault))
    ledger = await Caller(mesh.pods).run(traffic)
    await breaking
    return ledger


def run(name: str, seconds: float, rate: float, *, with_envoy: bool) -> Summary:
    with (
        tempfile.TemporaryDirectory() as folder,
        fleet(Path(folder), num_pods=4, models_per_pod=12, load_s=0.5, with_envoy=with_envoy) as mesh,
    ):
        uvloop.run(register(mesh.pods[0], _MODELS))
        traffic = Traffic(_MODELS, zipf(len(_MODELS), 0.9), rate, seconds)
        fault = {**SCENARIOS, **ENVOY_SCENARIOS}[name]
        return summarise(uvloop.run(_call(mesh, traffic, fault)), round(rate * seconds))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.chaos")
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", default=[])
    parser.add_argument("--envoy", action="store_true", help="call the pods through an Envoy each")
    parser.add_argument("--seconds", type=float, default=45.0)
    parser.add_argument("--rate", type=float, default=70.0)
    arguments = parser.parse_args()
    print("scenario | calls | failed | wrong | hung | over 3 s | p50 | p95 | longest | statuses")
    known = [*SCENARIOS, *(ENVOY_SCENARIOS if arguments.envoy else ())]
    if unknown := set(arguments.scenarios) - set(known):
        parser.error(f"{', '.join(sorted(unknown))}: the scenarios are {', '.join(known)}")
    for name in arguments.scenarios or known:
        found = run(name, arguments.seconds, arguments.rate, with_envoy=arguments.envoy)
        cells = [
            name,
            str(found.num_calls),
            str(found.num_failed),
            str(found.codes.get("WRONG", 0)),
            str(found.unanswered),
        ]
        cells += [str(found.over_3s), f"{found.p50_s * 1000:.0f} ms", f"{found.p95_s:.2f} s", f"{found.max_s:.1f} s"]
        failures = ", ".join(f"{code} {count}" for code, count in sorted(found.codes.items()) if code != "OK")
        print(" | ".join((*cells, failures)), flush=True)


if __name__ == "__main__":
    main()
