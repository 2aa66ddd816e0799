"""Measures the CPU time per token of mesh and runtime, over an engine without a model that sends at a fixed rate.

    python -m bench.front [--streams 256] [--output 200] [--step-ms 10] [--path mesh|runtime] [--api http|grpc]

The reciprocal of a process's CPU time per token is the most that it can carry. Wall times are meaningful only if each
process has its own core.
"""

import argparse
import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import uvloop

from bench import load, load_tgis
from bench.checkpoints import TINY, write
from bench.processes import cpu_seconds, process_of
from tests.support import stack

MODEL = "front"


@dataclass(frozen=True, slots=True)
class Front:
    """`url` is the mesh's HTTP base, `grpc` its gRPC address; `runtime_…` the runtime's own sockets; `model_id` what it calls the model."""

    url: str
    grpc: str
    runtime_http: str
    runtime_grpc: str
    runtime_pid: int
    mesh_pid: int
    model_id: str


@contextlib.contextmanager
def serve(step_s: float, log: Path | None = None) -> Iterator[Front]:
    """Run mesh and runtime over bench.fast_engine, with one model loaded."""
    with contextlib.ExitStack() as parts:
        home = Path(parts.enter_context(tempfile.TemporaryDirectory(prefix="repertory-front-")))
        checkpoint = write(TINY, home / "checkpoint")
        grpc, http = f"unix:{home}/runtime.sock", f"unix:{home}/http.sock"
        settings = {
            "listen": [grpc],
            "http_listen": http,
            "cache_dir": str(home / "cache"),
            "grace_s": 1.0,
            "model_roots": [str(home)],
        }
        (home / "runtime.json").write_text(json.dumps(settings))
        pace = {"BENCH_STEP_S": str(step_s), "BENCH_VOCAB": str(TINY.vocab)}
        runtime = parts.enter_context(
            stack.program("bench.fast_runtime", "--config", f"{home}/runtime.json", log=log, environment=pace)
        )
        mesh = parts.enter_context(stack.mesh(home, grpc, http, log))
        stack.load_and_wait(mesh, MODEL, f"file://{checkpoint}")
        yield Front(mesh.url, mesh.grpc, http, grpc, runtime.pid, mesh.pid, mesh.admin.model(MODEL).model_id)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--output", type=int, default=200)
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--path", choices=("mesh", "runtime"), default="mesh")
    parser.add_argument(
        "--api", choices=("http", "grpc"), default="http", help="OpenAI completions or TGIS' GenerateStream"
    )
    parser.add_argument("--clients", type=int, default=1, help="client processes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--log", type=Path, default=None, help="file for the servers' output")
    parser.add_argument(
        "--profile",
        default="",
        help="a program that is started with `--pid N` while runtime and mesh work, such as a sampler",
    )
    args = parser.parse_args()
    with serve(args.step_ms / 1000, args.log) as front:
        through_mesh = args.path == "mesh"
        url, headers = (front.url, None) if through_mesh else (front.runtime_http, {"mm-model-id": front.model_id})
        parts = {"runtime": front.runtime_pid, "mesh": front.mesh_pid}
        print(
            f"{'':>8} {'tok/s':>8} {'TTFT p50':>9} {'gap p50':>8} {'gap p99':>8} {'tok/event':>9} | CPU µs per token: runtime, engine, mesh"
        )
        for repeat in range(args.repeats):
            workload = load.Workload(args.streams, 16, args.output, TINY.vocab, seed=repeat)
            before = [cpu_seconds(pid) for pid in parts.values()]
            samplers = _samplers(args.profile, parts) if args.profile and repeat == args.repeats - 1 else []
            if args.api == "http":
                outcome = load.run_spread(url, MODEL, workload, args.clients, headers)
            else:
                target = (front.grpc, ()) if through_mesh else (front.runtime_grpc, (("mm-model-id", front.model_id),))
                outcome = uvloop.run(load_tgis.run(target[0], MODEL, workload, target[1]))
            spent = [cpu_seconds(pid).since(old) for pid, old in zip(parts.values(), before, strict=True)]
            by_part = {part: seconds for each in spent for part, seconds in each.by_part.items()}
            us = {part: 1e6 * seconds / outcome.tokens for part, seconds in by_part.items()}
            print(
                f"{args.path:>8} {outcome.tokens_per_s:>8.0f} {outcome.ttft_p50_s * 1e3:>7.0f}ms {outcome.gap_p50_s * 1e3:>6.1f}ms "
                f"{outcome.gap_p99_s * 1e3:>6.1f}ms {outcome.tokens / max(1, outcome.events):>9.2f} | "
                f"{us.get('runtime', 0):.1f}, {us.get('engine', 0):.1f}, {us.get('mesh', 0):.1f}",
                flush=True,
            )
            for sampler in samplers:
                sampler.wait()


def _samplers(command: str, parts: dict[str, int]) -> "list[subprocess.Popen[bytes]]":
    return [
        subprocess.Popen([*command.replace("PART", part).split(), "--pid", str(process_of(pid, part))])
        for part, pid in parts.items()
    ]


if __name__ == "__main__":
    main()
