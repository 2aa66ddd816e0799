"""Compares many streams at a fixed rate of messages through the mesh's Envoy with those through an Envoy that only forwards."""

import contextlib
import statistics
import tempfile
from pathlib import Path

from bench import h2_load
from bench.edge import MESSAGE, MODEL, SERVICE, Way
from bench.envoy_paths import BARE, OURS, bare_envoy, way_through_mesh
from bench.h2_load import frame, grpc_load
from tests.support import stack

STREAMS = 128
RATE = 50
SECONDS = 8
ASKED_CPU = 1.15
ASKED_RATE = 0.98  # of bare Envoy's, which keeps up unless the machine does not


def run(turns: int, settle_s: float) -> None:
    """Print a row for each path: messages a second, whether all came in time, and the CPU time of the processes between."""
    count = RATE * SECONDS
    load = grpc_load(f"{SERVICE}/GenerateStream", MODEL, MESSAGE, len(frame(MESSAGE)) * count)
    shares: dict[str, list[float]] = {BARE: [], OURS: []}
    rates: dict[str, list[float]] = {BARE: [], OURS: []}
    failed = dict.fromkeys(shares, 0)
    with contextlib.ExitStack() as parts:
        home = Path(parts.enter_context(tempfile.TemporaryDirectory(prefix="edge-")))
        server = f"127.0.0.1:{stack.free_port()}"
        parts.enter_context(stack.program("bench.paced_server", server, str(RATE), str(count)))
        parts.enter_context(stack.program("bench.idle_runtime", str(home)))
        paths = [parts.enter_context(bare_envoy(home, server)), parts.enter_context(way_through_mesh(home, server))]
        for path in paths:
            h2_load.wait_until_answering(load, path.address)
        load.for_seconds(paths[-1].address, 1, settle_s)
        for turn in range(turns):
            for path in paths if turn % 2 == 0 else reversed(paths):
                share, rate, lost = _measure(path, load, count)
                shares[path.name].append(share)
                rates[path.name].append(rate)
                failed[path.name] += lost
    print("\n| streams | path | messages/s | of schedule | failed | CPU of a core | of bare | asked met |")
    print("| --- | --- | --: | --: | --: | --: | --: | --- |")
    ratio = statistics.median(own / bare for own, bare in zip(shares[OURS], shares[BARE], strict=True))
    for name in shares:
        rate = statistics.median(rates[name])
        row = [f"{STREAMS} × {RATE}/s", name, f"{rate:,.0f}", f"{rate / (STREAMS * RATE):.1%}", str(failed[name])]
        row.append(f"{statistics.median(shares[name]):.1%}")
        if name == OURS:
            keeps_up = rate >= ASKED_RATE * statistics.median(rates[BARE])
            is_met = ratio <= ASKED_CPU and not failed[name] and keeps_up
            row += [f"{ratio:.2f}", "yes" if is_met else "no"]
        else:
            row += ["", ""]
        print(f"| {' | '.join(row)} |", flush=True)


def _measure(path: Way, load: h2_load.Load, count: int) -> tuple[float, float, int]:
    """Return the CPU time between as a share of a core, messages a second, and the streams without all messages."""
    before_s = path.cpu_s()
    done = load.calls(path.address, STREAMS, STREAMS)
    took_s = done.calls / done.calls_per_s
    return (path.cpu_s() - before_s) / took_s, done.calls * count / took_s, done.failed
