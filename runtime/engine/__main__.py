"""`python -m runtime.engine --socket PATH --config JSON [--crash-marker PATH]`: one engine, connected to its front.

Exits 0 after a Shutdown or when the front disconnects, 1 with a traceback on standard error when the device is lost, and CANNOT_START after a
StartFailed message.
"""

import argparse
import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback

import msgspec

from common.errors import ConfigError
from common.exit_status import CANNOT_START
from common.parent import die_with_parent
from runtime.checkpoint.device_fit import MIN_KV_TOKENS
from runtime.config.schema import EngineConfig
from runtime.engine.core.loop import EngineLoop
from runtime.engine.grammar.mask_sources import GrammarMaskSources
from runtime.engine.import_stubs import light_imports
from runtime.engine.parallel.shard import Shard
from runtime.engine.ranks.followers import Followers, end_engine
from runtime.ipc.crash_marker import CrashMarker
from runtime.ipc.engine_channel import Channel
from runtime.ipc.messages import Hello, StartFailed


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m runtime.engine", description=__doc__)
    parser.add_argument("--socket", required=True, help="unix socket on which the front listens")
    parser.add_argument("--config", default="{}", help="EngineConfig as JSON")
    parser.add_argument("--crash-marker", help="file that keeps the name of the model that runs")
    options = parser.parse_args(arguments)
    config = msgspec.json.decode(options.config, type=EngineConfig)
    # The front decides when the engine ends. If the front dies, a step may take minutes until the closed connection is noticed.
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    crash_marker = CrashMarker(options.crash_marker) if options.crash_marker else None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(options.socket)

    # Loads and compilers run beside the engine thread, which must get the interpreter back soon: an eager step gives it up at each of its hundreds of
    # launches. With 1 ms, a step of 25 ms took 0.3 to 1 s beside three compiling threads.
    sys.setswitchinterval(0.0001)
    # These imports come late, because torch takes seconds and the front waits for the connection.
    followers: Followers | None = None
    if config.tensor_parallel > 1:
        followers = Followers(config, end_engine(lambda: _started(followers)))
    with light_imports():
        if config.device != "cpu":
            # The driver takes a second to start; it does so beside the imports.
            threading.Thread(target=_wake_device, args=(config.device,), name="wake", daemon=True).start()
        from runtime.engine.device.backend import import_for_loads, make_backend

        import_for_loads(config)

    channel = Channel(connection)
    try:
        shard = Shard(0, config.tensor_parallel)
        backend = make_backend(config, shard, "" if followers is None else followers.rendezvous)
        if followers is not None:
            backend.limit_slabs(followers.wait_ready())
        slab_bytes = backend.slab_bytes
        channel.emit(
            Hello(
                os.getpid(),
                backend.device,
                backend.device_name,
                backend.total_slabs * slab_bytes,
                backend.host_total_bytes,
                slab_bytes,
                MIN_KV_TOKENS,
            )
        )
        mark = crash_marker.mark if crash_marker is not None else lambda _: None
        masks = GrammarMaskSources()
        loop = EngineLoop(
            config,
            backend,
            channel.inbox,
            channel.emit,
            mark,
            time.monotonic,
            record=None if followers is None else followers.send,
            mask_sources=masks,
            settle=_no_error if followers is None else followers.settle,
        )
        # Imported objects live as long as the process, so full collections must not scan them and delay a step.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 50, 50)
        loop.run()
    except ConfigError as error:
        channel.emit(StartFailed(error.message))
        return CANNOT_START
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        channel.close()
        if followers is not None:
            followers.close()
    return 0


def _started(followers: Followers | None) -> Followers:
    assert followers is not None
    return followers


def _no_error(model_id: str) -> None:
    """Stand for the agreement of one rank with itself."""


def _wake_device(name: str) -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.init()
        torch.zeros(1, device="cuda" if name == "auto" else name)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Do not wait for loader threads and device libraries.
    os._exit(status)
