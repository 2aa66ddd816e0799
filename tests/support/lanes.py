"""Distributes test files over the workers of pytest-xdist: the last worker takes files that mostly wait, the others files that mostly compute.

Half of the time of the mesh's tests passes in timeouts and in other processes. A worker more than there are cores uses the cores meanwhile.
"""

from collections.abc import Iterable

from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

WAITING = "tests/mesh/"


def is_waiting_worker(worker_id: str, num_workers: int) -> bool:
    """Whether pytest-xdist's worker of this id, as `gw0`, takes the files that mostly wait."""
    return worker_id == f"gw{num_workers - 1}"


def next_file(queue: Iterable[str], *, waits: bool) -> str:
    """Return the first file of a worker's lane, or the first of all if its lane is empty. `queue` must not be empty."""
    files = list(queue)
    return next((file for file in files if file.startswith(WAITING) == waits), files[0])


class LaneScheduling(LoadFileScheduling):
    """Runs the tests of a file on one worker, like `--dist loadfile`, and chooses the file by the worker's lane."""

    def _assign_work_unit(self, node: WorkerController) -> None:
        waits = is_waiting_worker(node.gateway.id, self.numnodes)
        self.workqueue.move_to_end(next_file(self.workqueue, waits=waits), last=False)
        super()._assign_work_unit(node)
