"""A process that writes to an embedded store endlessly, by a script that the test shares, and reports each write once it is acknowledged.

`python -m tests.support.scripted_writes DIRECTORY SEED`: prints the number of each step.
"""

import asyncio
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mesh.store.embedded import EmbeddedStore
from mesh.store.protocol import Delete, Put


@dataclass(frozen=True, slots=True)
class Step:
    """One transaction over two keys, which always hold the same; `value` None: both are deleted."""

    number: int
    keys: tuple[str, str]
    value: bytes | None


def steps(seed: int) -> Iterator[Step]:
    choose = random.Random(seed)
    number = 0
    while True:
        number += 1
        pair = choose.randrange(5)
        value = f"{seed}:{number}".encode() * choose.choice([1, 300])
        yield Step(number, (f"/a/{pair}", f"/b/{pair}"), None if choose.random() < 0.2 else value)


async def main(directory: Path, seed: int) -> None:
    store = EmbeddedStore(directory)
    await store.open()
    for step in steps(seed):
        value = step.value
        await store.txn([], [Delete(key) if value is None else Put(key, value) for key in step.keys])
        # one short write to a pipe is never torn by a kill
        os.write(1, b"%d\n" % step.number)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
