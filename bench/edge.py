"""Compares a gRPC call through the mesh with one through a bare grpc.aio proxy: rate, latency and the CPU time of the process between.

    python -m bench.edge [--envoy] [--seconds 1.0] [--turns 5] [--clients 1,32,128] [--streams 1,32] [--churn-calls 60000]

Client and server are compiled programs (bench/h2_load.py), so that the two processes compared do most of the work. In each turn every path is measured
once, one after the other. A ratio is the median of the turns' ratios, because the machine's speed changes from turn to turn; other figures are
medians, too. `direct` has no process between. Then models are unloaded while 32 clients call them, and the failed calls are counted.
"""

import argparse
import contextlib
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench import h2_load
from bench.h2_load import Load, Run, frame, grpc_load
from tests.support import stack
from wire.fmaas import generation_pb2

MODEL = "edge"
SERVICE = "fmaas.GenerationService"
MESSAGE = generation_pb2.BatchedGenerationRequest(
    requests=[generation_pb2.GenerationRequest(text="x" * 60)]
).SerializeToString()  # 64 bytes
EVENTS = 100
CHURN_MODELS = 4
CHURN_CLIENTS = 32
CHURN_PAUSE_S = 0.2
BASE = "bare grpc.aio proxy"
MESH = "mesh"
WORKERS = "mesh, 2 workers"
ENVOY = "mesh with Envoy"
FRONTS: Mapping[str, Mapping[str, Any]] = {ENVOY: {"envoy": "auto"}, WORKERS: {"workers": 2}}

# Of Envoy without a control plane, at 1, 32 and 128 clients, as measured on another day by a compiled client.
MODELMESH = "KServe ModelMesh's share of bare Envoy's calls/s: 0.78, 0.74 and 0.93 at 1, 32 and 128 clients"


@dataclass(frozen=True, slots=True)
class Way:
    """One way to the server: its address, and the processes between, whose CPU time counts."""

    name: str
    address: str
    pids: tuple[int, ...] = ()

    def cpu_s(self) -> float:
        times = [psutil.Process(pid).cpu_times() for pid in self.pids]
        return sum(each.user + each.system for each in times)


@dataclass(frozen=True, slots=True)
class Sample:
    """One path's figures in one turn."""

    run: Run
    cpu_us: float  # of the processes between, per call


@dataclass(frozen=True, slots=True)
class Goal:
    """What is asked of the mesh, as ratios to the bare proxy."""

    calls: float
    p99: float
    cpu: float


UNARY = Goal(calls=0.85, p99=1.25, cpu=1.3)
STREAM = Goal(calls=0.9, p99=float("inf"), cpu=float("inf"))


@contextlib.contextmanager
def serve() -> Iterator[list[Way]]:
    """Run the server and every path to it."""
    with contextlib.ExitStack() as parts:
        home = Path(parts.enter_context(tempfile.TemporaryDirectory(prefix="repertory-edge-")))
        answers = {f"{SERVICE}/Generate": frame(MESSAGE), f"{SERVICE}/GenerateStream": frame(MESSAGE) * EVENTS}
        server = parts.enter_context(h2_load.serve(answers))
        paths = [Way("direct", server)]
        bare = f"127.0.0.1:{stack.free_port()}"
        proxy = parts.enter_context(stack.program("bench.grpc_proxy", bare, server))
        paths.append(Way(BASE, bare, (proxy.pid,)))
        parts.enter_context(stack.program("bench.idle_runtime", str(home)))
        # Loads go to the runtime, inference to the compiled server.
        sockets = (f"unix:{home}/runtime.sock", f"unix:{home}/http.sock")
        mesh = parts.enter_context(stack.mesh(home, *sockets, runtime_inference_grpc=server))
        stack.load_and_wait(mesh, MODEL, "file:///nothing")
        paths.append(Way(MESH, mesh.grpc, (mesh.pid,)))
        parted = Path(parts.enter_context(tempfile.TemporaryDirectory(prefix="repertory-edge-")))
        shared = f"{parted}/shared"
        mesh = parts.enter_context(
            stack.mesh(parted, *sockets, None, runtime_inference_grpc=server, workers=2, envoy_dir=shared)
        )
        stack.load_and_wait(mesh, MODEL, "file:///nothing")
        paths.append(Way(WORKERS, mesh.grpc, (mesh.pid, *(child.pid for child in psutil.Process(mesh.pid).children()))))
        for path in paths:
            h2_load.wait_until_answering(unary(), path.address)
        yield paths


def unary() -> Load:
    return grpc_load(f"{SERVICE}/Generate", MODEL, MESSAGE, len(frame(MESSAGE)))


def stream() -> Load:
    return grpc_load(f"{SERVICE}/GenerateStream", MODEL, MESSAGE, len(frame(MESSAGE)) * EVENTS)


def measure(path: Way, load: Load, clients: int, seconds: float) -> Sample:
    before_s = path.cpu_s()
    run = load.for_seconds(path.address, clients, seconds)
    if run.failed:
        raise RuntimeError(f"{run.failed} of {run.calls} calls through {path.name} failed")
    if not run.calls:
        raise RuntimeError(f"no call through {path.name} ended within {seconds:g} s; set a higher --seconds")
    return Sample(run, 1e6 * (path.cpu_s() - before_s) / run.calls)


def compare(
    paths: Sequence[Way],
    load: Load,
    clients: int,
    seconds: float,
    turns: int,
    *,
    per_call: int,
    goal: Goal,
    base: str = BASE,
    ours: str = MESH,
    kind: str = "",
) -> None:
    """Print a row for each path. `kind`: the call's, if it is not gRPC. `per_call`: messages of a call, to which rate and CPU time are related. `goal`: of `ours` beside `base`."""
    samples: dict[str, list[Sample]] = {path.name: [] for path in paths}
    for turn in range(turns):
        # Every other turn in the other order: what a turn's first path warms up does not always favour the same one.
        for path in paths if turn % 2 == 0 else reversed(paths):
            samples[path.name].append(measure(path, load, clients, seconds))

    def median(name: str, figure: Callable[[Sample], float]) -> float:
        return statistics.median(figure(sample) for sample in samples[name])

    def ratio(name: str, figure: Callable[[Sample], float]) -> float:
        pairs = zip(samples[name], samples[base], strict=True)
        return statistics.median(figure(own) / figure(theirs) for own, theirs in pairs)

    kind = kind or ("unary" if per_call == 1 else f"stream of {per_call}")
    for path in paths:
        rate = median(path.name, lambda sample: sample.run.calls_per_s * per_call)
        p50, p99 = (median(path.name, figure) for figure in (_p50_s, _p99_s))
        row = [kind, f"{clients}", path.name, f"{rate:,.0f}", f"{p50 * 1e3:.2f}", f"{p99 * 1e3:.2f}"]
        if path.pids:
            cpu = median(path.name, _cpu_us) / per_call
            calls, tail, cost = (ratio(path.name, figure) for figure in (_calls_per_s, _p99_s, _cpu_us))
            row += [f"{cpu:.{0 if per_call == 1 else 1}f}", f"{calls:.2f}", f"{tail:.2f}", f"{cost:.2f}"]
            is_met = calls >= goal.calls and tail <= goal.p99 and cost <= goal.cpu
            row.append(("yes" if is_met else "no") if path.name == ours else "")
        else:
            row += [""] * 5
        print(f"| {' | '.join(row)} |", flush=True)


def _calls_per_s(sample: Sample) -> float:
    return sample.run.calls_per_s


def _p50_s(sample: Sample) -> float:
    return sample.run.p50_s


def _p99_s(sample: Sample) -> float:
    return sample.run.p99_s


def _cpu_us(sample: Sample) -> float:
    return sample.cpu_us


def churn(num_calls: int, path: str) -> None:
    """Count the calls on a path that fail while each model in turn is unloaded, over a runtime that refuses calls for models that it does not have."""
    with contextlib.ExitStack() as parts:
        home = Path(parts.enter_context(tempfile.TemporaryDirectory(prefix="repertory-edge-")))
        parts.enter_context(stack.program("bench.idle_runtime", str(home)))
        settings = FRONTS.get(path, {})
        mesh = parts.enter_context(
            stack.mesh(
                home,
                f"unix:{home}/runtime.sock",
                f"unix:{home}/http.sock",
                None,
                envoy_dir=f"{home}/shared",
                **settings,
            )
        )
        names = [f"{MODEL}-{number}" for number in range(CHURN_MODELS)]
        for name in names:
            stack.load_and_wait(mesh, name, "file:///nothing")
        stop = threading.Event()
        num_unloads = 0

        def unload_in_turn() -> None:
            nonlocal num_unloads
            while not stop.wait(CHURN_PAUSE_S):
                mesh.admin.unload(names[num_unloads % len(names)])
                num_unloads += 1

        def call(name: str) -> Run:
            # The runtime sends the request's message back.
            load = grpc_load(f"{SERVICE}/Generate", name, MESSAGE, len(frame(MESSAGE)))
            return load.calls(mesh.grpc, CHURN_CLIENTS // CHURN_MODELS, num_calls // CHURN_MODELS)

        with ThreadPoolExecutor() as threads:
            unloading = threads.submit(unload_in_turn)
            try:
                runs = list(threads.map(call, names))
            finally:
                stop.set()
            unloading.result()
    failed, calls = sum(run.failed for run in runs), sum(run.calls for run in runs)
    print(
        f"\n{path}: {calls:,} calls by {CHURN_CLIENTS} clients for {CHURN_MODELS} models during {num_unloads} unloads, after each of which "
        f"the next call loads the model again: {failed} failed; the slowest model's p99 is {max(run.p99_s for run in runs) * 1e3:.1f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one measurement")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--clients", default="1,32,128", help="numbers of clients of unary calls; empty = none")
    parser.add_argument("--streams", default="1,32", help="numbers of concurrent streams; empty = none")
    parser.add_argument(
        "--churn-calls", type=int, default=60_000, help="calls during which models come and go; 0 = none"
    )
    parser.add_argument("--envoy", action="store_true", help="let the models come and go behind Envoy, too")
    args = parser.parse_args()
    h2_load.check_installed()
    print("| call | clients | path | messages/s | p50 ms | p99 ms | CPU µs | of bare: rate | p99 | CPU | asked met |")
    print("| --- | --: | --- | --: | --: | --: | --: | --: | --: | --: | --- |")
    with serve() as paths:
        for count in filter(None, args.clients.split(",")):
            compare(paths, unary(), int(count), args.seconds, args.turns, per_call=1, goal=UNARY)
        for count in filter(None, args.streams.split(",")):
            compare(paths, stream(), int(count), args.seconds, args.turns, per_call=EVENTS, goal=STREAM)
    if args.churn_calls:
        for path in (MESH, WORKERS, *((ENVOY,) if args.envoy else ())):
            churn(args.churn_calls, path)
    print(f"\n{MODELMESH}")


if __name__ == "__main__":
    main()
