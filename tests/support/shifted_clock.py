"""Runs the mesh in a process whose wall clock is off: `python -m tests.support.shifted_clock SECONDS serve-mesh …`."""

import runpy
import sys
import time


def main() -> None:
    shift_s = float(sys.argv[1])
    real_ns = time.time_ns
    # The mesh reads no other wall clock. gRPC turns its deadlines into times of `time.time`, which must stay right.
    time.time_ns = lambda: real_ns() + round(shift_s * 1e9)
    sys.argv = ["mesh", *sys.argv[2:]]
    runpy.run_module("mesh", run_name="__main__")


if __name__ == "__main__":
    main()
