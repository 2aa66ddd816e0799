"""Keeps what the indexes of local files say: a GGUF file's index takes seconds to read, and every prediction of a size needs it."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock

from cachetools import LRUCache

from runtime.puller.checkpoint_check import CheckpointSummary
from runtime.puller.metadata import Found, look_local

_NUM_KEPT = 256


class IndexCache:
    """Reads the index of the same files once, for all threads that ask meanwhile and later. What was read is kept by the files' identity."""

    def __init__(self, read: Callable[[CheckpointSummary], Found] = look_local) -> None:
        self._read = read
        self._lock = Lock()
        self._known: LRUCache[str, Future[Found]] = LRUCache(_NUM_KEPT)

    def get(self, found: CheckpointSummary) -> Found:
        """Return the configuration and the tensors' shapes. Raises what reading raises; a failure is not kept."""
        with self._lock:
            known = self._known.get(found.identity)
            reading: Future[Found] = known or Future()
            if known is None:
                self._known[found.identity] = reading
        if known is None:
            try:
                reading.set_result(self._read(found))
            except BaseException as error:
                with self._lock:
                    self._known.pop(found.identity, None)
                reading.set_exception(error)
        return reading.result()
