"""The packer process: reads a request from stdin and writes events to stdout."""

import errno
import os
import sys
import threading
import traceback
from typing import TextIO

import msgspec

from common.parent import die_with_parent
from runtime.engine.import_stubs import light_imports
from runtime.errors import RepertoryError
from runtime.puller.pack.request import PackDone, PackEvent, PackFailed, PackRequest


def main() -> int:
    die_with_parent()
    # stdout carries events only, so the output of libraries goes to stderr.
    events: TextIO = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(event: PackEvent) -> None:
        events.write(msgspec.json.encode(event).decode() + "\n")
        events.flush()

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Tensors are processed concurrently, so each needs one core only.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # transformers reads no GGUF without accelerate
    with light_imports(keep=("accelerate",)):
        # The driver takes a second or two to start; it does so beside the imports.
        threading.Thread(target=_wake_device, name="wake", daemon=True).start()
        from runtime.puller.pack.packing import pack

    try:
        request = msgspec.json.decode(sys.stdin.buffer.read(), type=PackRequest)
        say(PackDone(pack(request, say)))
        return 0
    except RepertoryError as error:
        say(PackFailed(error.code, error.message))
    except OSError as error:
        say(
            PackFailed(
                "FAILED_PRECONDITION",
                f"packing failed: {error}",
                error.errno if error.errno in (errno.ENOSPC, errno.EDQUOT) else 0,
            )
        )
    except MemoryError:
        say(PackFailed("RESOURCE_EXHAUSTED", "packing failed: not enough memory"))
    except Exception as error:
        traceback.print_exc()
        say(PackFailed("INTERNAL", f"packing failed: {type(error).__name__}: {error}"))
    return 1


def _wake_device() -> None:
    import torch

    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")


if __name__ == "__main__":
    sys.exit(main())
