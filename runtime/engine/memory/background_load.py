"""Fills a weight buffer in a thread of its own; readers wait for it group by group."""

import threading
from collections.abc import Callable

from runtime.engine.memory.weight_buffer import Filler, WeightBuffer
from runtime.errors import Cancelled, LoadFailed, RepertoryError


class BackgroundLoad:
    """Starts at once. `on_group(i)` runs in the thread after group i is filled and before waiters for it continue."""

    def __init__(self, filler: Filler, image: WeightBuffer, on_group: Callable[[int], None] | None = None) -> None:
        self._filler = filler
        self._image = image
        self._on_group = on_group
        self._changed = threading.Condition()
        self._groups_in = 0
        self._error: RepertoryError | None = None
        self._cancelled = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fill", daemon=True)
        self._thread.start()

    def done(self) -> bool:
        """Whether the fill has ended, well or not."""
        return self._groups_in == len(self._filler.group_ends) or self._error is not None

    def failed(self) -> RepertoryError | None:
        return self._error

    def wait(self, group: int) -> None:
        """Wait until groups 0 … `group` are filled. Raises the error that ended the fill."""
        if self._groups_in <= group:
            with self._changed:
                self._changed.wait_for(lambda: self._groups_in > group or self._error is not None)
        if self._groups_in <= group and self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Stop the fill and wait until the thread no longer writes to the image."""
        self._cancelled.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._filler.fill(self._image, self._cancelled, self._arrived)
        except RepertoryError as error:
            self._fail(error)
        except Exception as error:
            self._fail(LoadFailed(f"reading weights failed: {type(error).__name__}: {error}"))
        else:
            if not self.done():
                self._fail(Cancelled("the fill ended early"))

    def _arrived(self, group: int) -> None:
        if self._on_group is not None:
            self._on_group(group)
        with self._changed:
            self._groups_in = group + 1
            self._changed.notify_all()

    def _fail(self, error: RepertoryError) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()
