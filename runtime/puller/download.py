"""Fetches the files of a model concurrently, because one connection is rarely as fast as the disk."""

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from runtime.errors import Cancelled
from runtime.models.model_state import Phase
from runtime.puller.progress import PullJob
from runtime.puller.rate_floor import RateFloor
from runtime.puller.source import Listing, RemoteFile, Source

_FILES_AT_ONCE = 8


def pull(
    source: Source,
    listing: Listing,
    directory: Path,
    job: PullJob,
    *,
    reserve: Callable[[int], int],
    min_bytes_per_s: int = 0,
) -> None:
    """Fetch the files that are missing in `directory`. Raises the first failure, once the other fetches have stopped.

    `reserve` is called before more bytes are kept than the listing states: it makes room for a total and returns what it has reserved.
    """
    lock = threading.Lock()
    rate = RateFloor(min_bytes_per_s, listing.origin)
    reserved_bytes = listing.total_bytes
    failed = threading.Event()
    done_bytes = 0
    under_way: list[str] = []  # The oldest is the one reported, so that the text stays the same while files take turns.

    def fetch(file: RemoteFile) -> None:
        def arrived(count: int) -> None:
            nonlocal done_bytes, reserved_bytes
            if failed.is_set():
                raise Cancelled("another file of the model failed")
            with lock:
                done_bytes += count
                rate.arrived(count)
                if done_bytes > reserved_bytes:
                    reserved_bytes = reserve(done_bytes)
                job.say(Phase.PULLING, done_bytes, listing.total_bytes, under_way[0])

        if failed.is_set():
            return
        target = directory / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock:
            under_way.append(file.name)
        try:
            source.fetch(file, target, job, arrived)
        except BaseException:
            failed.set()
            raise
        finally:
            with lock:
                under_way.remove(file.name)

    with ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="pull") as threads:
        futures = [threads.submit(fetch, file) for file in listing.files]
        wait(futures, return_when=FIRST_EXCEPTION)
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        job.check()  # if it was cancelled, that is why
        raise next((error for error in errors if not isinstance(error, Cancelled)), errors[0])
