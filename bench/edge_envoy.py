"""Compares calls through the mesh's Envoy with calls through an Envoy that only forwards: rate, latency and the CPU time of what is between.

    python -m bench.edge_envoy [--rows unary,streams,paced,chat,changes] [--seconds 1.0] [--turns 5] [--clients 1,32,128] [--streams 1,32]

Client, server and rows are those of bench.edge; a ratio is to the Envoy that only forwards. The CPU time of the mesh's row is that of Envoy and the mesh.

- paced: 128 streams of 50 messages a second each.
- chat: HTTP with the model in a body of 1 KB, beside the same Envoy without the filters that read bodies and with the model in a header.
- changes: the time from a load's end to the first call that Envoy carries, with 1,000 loaded models, at the pod of the copy and at another one.
"""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench import edge_changes, edge_chat, edge_paced, h2_load
from bench.edge import EVENTS, MESSAGE, SERVICE, Goal, Way, compare, stream, unary
from bench.envoy_paths import BARE, OURS, bare_envoy, way_through_mesh
from bench.h2_load import frame
from tests.support import stack

UNARY = Goal(calls=0.95, p99=1.1, cpu=1.15)
STREAM = Goal(calls=0.95, p99=float("inf"), cpu=1.15)
SETTLE_S = 3.0  # until Envoy has the model's cluster, and its routes the model's name

ROWS = ("unary", "streams", "paced", "chat", "changes")


@contextlib.contextmanager
def _paths() -> Iterator[list[Way]]:
    with contextlib.ExitStack() as parts:
        home = Path(parts.enter_context(tempfile.TemporaryDirectory(prefix="edge-")))
        answers = {f"{SERVICE}/Generate": frame(MESSAGE), f"{SERVICE}/GenerateStream": frame(MESSAGE) * EVENTS}
        server = parts.enter_context(h2_load.serve(answers))
        parts.enter_context(stack.program("bench.idle_runtime", str(home)))
        paths = [
            Way("direct", server),
            parts.enter_context(bare_envoy(home, server)),
            parts.enter_context(way_through_mesh(home, server)),
        ]
        for path in paths:
            h2_load.wait_until_answering(unary(), path.address)
        unary().for_seconds(paths[-1].address, 1, SETTLE_S)
        yield paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--seconds", type=float, default=1.0, help="of one measurement")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--clients", default="1,32,128", help="numbers of clients of unary calls")
    parser.add_argument("--streams", default="1,32", help="numbers of concurrent streams")
    parser.add_argument("--chat-clients", default="32", help="numbers of clients of chat calls")
    parser.add_argument("--models", type=int, default=1000, help="loaded models of `changes`")
    parser.add_argument("--changes", type=int, default=50, help="loads of `changes`")
    args = parser.parse_args()
    rows = args.rows.split(",")
    if unknown := set(rows) - set(ROWS):
        parser.error(f"--rows {', '.join(sorted(unknown))}: known are {', '.join(ROWS)}")
    h2_load.check_installed()
    if {"unary", "streams", "chat"} & set(rows):
        print(
            "| call | clients | path | messages/s | p50 ms | p99 ms | CPU µs | of bare: rate | p99 | CPU | asked met |"
        )
        print("| --- | --: | --- | --: | --: | --: | --: | --: | --: | --: | --- |")
    if {"unary", "streams"} & set(rows):
        with _paths() as paths:
            for row, load, counts, per_call, goal in (
                ("unary", unary(), args.clients, 1, UNARY),
                ("streams", stream(), args.streams, EVENTS, STREAM),
            ):
                for count in counts.split(",") if row in rows else ():
                    compare(
                        paths,
                        load,
                        int(count),
                        args.seconds,
                        args.turns,
                        per_call=per_call,
                        goal=goal,
                        base=BARE,
                        ours=OURS,
                    )
    if "chat" in rows:
        edge_chat.run([int(count) for count in args.chat_clients.split(",")], args.seconds, args.turns, SETTLE_S)
    if "paced" in rows:
        edge_paced.run(args.turns, SETTLE_S)
    if "changes" in rows:
        edge_changes.run(args.models, args.changes)


if __name__ == "__main__":
    main()
