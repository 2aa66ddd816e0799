"""A model's files come beside each other; what fails stops them all, and says why."""

import threading
from itertools import pairwise
from pathlib import Path

import pytest

from runtime.errors import Cancelled, LoadFailed
from runtime.models.model_state import Progress
from runtime.puller.download import pull
from runtime.puller.progress import PullJob
from runtime.puller.source import Arrived, Listing, RemoteFile

FILES = [RemoteFile(f"f{number}", "", 100) for number in range(6)]


class Scripted:
    """A source whose files wait for each other; `broken` fails once all have begun, and the rest would go on for ever."""

    def __init__(self, broken: str = "") -> None:
        self.together = threading.Barrier(len(FILES))
        self.broken = broken

    def listing(self, job: PullJob) -> Listing:
        return Listing("scripted", FILES)

    def read(self, file: RemoteFile, start: int, count: int, job: PullJob) -> bytes:
        return b""

    def fetch(self, file: RemoteFile, target: Path, job: PullJob, arrived: Arrived) -> None:
        self.together.wait(60)
        if file.name == self.broken:
            raise LoadFailed(f"{file.name} is corrupt")
        if self.broken:
            while True:
                job.wait(0.01)
                arrived(0)
        for count in range(100):
            if count == 50:
                self.together.wait(60)
            arrived(1)
        target.write_bytes(bytes(100))


def test_pull_fetches_files_concurrently_and_sums_their_progress(tmp_path: Path) -> None:
    seen: list[Progress] = []
    source = Scripted()
    pull(source, source.listing(PullJob(seen.append)), tmp_path, PullJob(seen.append), reserve=int)
    assert len(list(tmp_path.iterdir())) == len(FILES)
    counts = [progress.done_bytes for progress in seen]
    assert counts == sorted(counts)
    assert counts[-1] == seen[-1].total_bytes == 600
    names = [progress.text for progress in seen]
    assert len(set(names)) == sum(one != other for one, other in pairwise(["", *names])), "files took turns in the text"


def test_pull_stops_all_files_when_one_fails(tmp_path: Path) -> None:
    source = Scripted("f3")
    with pytest.raises(LoadFailed, match="f3 is corrupt"):
        pull(
            source,
            source.listing(PullJob(lambda progress: None)),
            tmp_path,
            PullJob(lambda progress: None),
            reserve=int,
        )


def test_pull_can_be_cancelled(tmp_path: Path) -> None:
    job = PullJob(lambda progress: None)
    source = Scripted("nothing of that name")
    threading.Timer(0.2, job.cancel).start()
    with pytest.raises(Cancelled, match="the load was cancelled"):
        pull(source, source.listing(job), tmp_path, job, reserve=int)
