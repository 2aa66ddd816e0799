"""`python -m runtime.engine.ranks --rank R --size N --socket FD --rendezvous FILE --config JSON`: a rank after the first, started by rank 0."""

import argparse
import os
import signal
import socket
import sys

import msgspec

from common.parent import die_with_parent
from runtime.config.schema import EngineConfig
from runtime.engine.parallel.shard import Shard
from runtime.engine.ranks.follower import run


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m runtime.engine.ranks", description=__doc__)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--socket", type=int, required=True, help="file descriptor of the connection to rank 0")
    parser.add_argument("--rendezvous", required=True, help="file by which the ranks meet")
    parser.add_argument("--config", required=True, help="EngineConfig as JSON")
    options = parser.parse_args(arguments)
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.setswitchinterval(0.0001)
    connection = socket.socket(fileno=options.socket)
    config = msgspec.json.decode(options.config, type=EngineConfig)
    return run(connection, Shard(options.rank, options.size), options.rendezvous, config)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
