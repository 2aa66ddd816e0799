"""The files of host arenas: those of all ranks go with their front process, also when it was killed."""

import os
from pathlib import Path

from runtime.engine_client.shared_memory import SharedMemoryFile

_NO_PROCESS = 1 << 30  # above the kernel's largest process id


def test_shared_memory_file_removes_the_files_of_all_ranks(tmp_path: Path) -> None:
    file = SharedMemoryFile(tmp_path)
    of_rank = Path(f"{file.path}.1")
    of_rank.touch()
    file.remove()
    assert not list(tmp_path.iterdir())


def test_shared_memory_file_removes_what_dead_processes_left(tmp_path: Path) -> None:
    left = [tmp_path / f"repertory-{_NO_PROCESS}-0123abcd{rank}" for rank in ("", ".1", ".2")]
    kept = [tmp_path / f"repertory-{os.getpid()}-0123abcd.1", tmp_path / "other"]
    for path in (*left, *kept):
        path.touch()
    file = SharedMemoryFile(tmp_path)
    assert set(tmp_path.iterdir()) == {*kept, file.path}
