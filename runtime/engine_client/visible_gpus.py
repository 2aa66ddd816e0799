"""Counts the GPUs that this process may use: `python -m runtime.engine_client.visible_gpus` prints their number.

The driver is asked in a process of its own, because the front process, which starts others, must not hold it.
"""

import ctypes
import subprocess
import sys
from pathlib import Path

_TIMEOUT_S = 60.0


def visible_gpus(device: str, device_files: Path = Path("/dev")) -> int:
    """Return the number of GPUs as CUDA numbers them (CUDA_VISIBLE_DEVICES, containers); 0 for a CPU.

    The driver takes up to a second to answer, so it is not asked about a single GPU.
    """
    num_files = 0 if device == "cpu" else len(list(device_files.glob("nvidia[0-9]*")))
    if num_files < 2:
        return num_files
    command = [sys.executable, "-m", "runtime.engine_client.visible_gpus"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    return int(found.stdout) if found.stdout.strip().isdigit() else 0


def count_gpus(library: str = "libcuda.so.1") -> int:
    """Return what the driver counts; 0 if there is none."""
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


if __name__ == "__main__":
    print(count_gpus())
