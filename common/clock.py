"""Wall-clock time in the unit that ModelMesh's records use."""

import time


def epoch_ms() -> int:
    return time.time_ns() // 1_000_000
