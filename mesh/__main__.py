"""`python -m mesh` and the `repertory` command."""

import signal
import sys


def main() -> int:
    """Run the command line. Ctrl-C ends the process without a traceback, also while modules are imported."""
    handler = signal.getsignal(signal.SIGINT)  # SIG_IGN stays: the process runs in the background
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from mesh.cli import main as run

    signal.signal(signal.SIGINT, handler)
    try:
        return run()
    finally:
        if handler is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
