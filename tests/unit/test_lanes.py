"""The choice of the next test file for a worker."""

import pytest

from tests.support.lanes import is_waiting_worker, next_file

COMPUTING, WAITING = "tests/kernels/test_a.py", "tests/mesh/api/test_b.py"


@pytest.mark.parametrize(
    ("queue", "waits", "wanted"),
    [
        ((COMPUTING, WAITING), True, WAITING),
        ((WAITING, COMPUTING), False, COMPUTING),
        ((COMPUTING, "tests/e2e/test_c.py"), False, COMPUTING),
        ((COMPUTING,), True, COMPUTING),
        ((WAITING,), False, WAITING),
    ],
)
def test_next_file_is_of_the_workers_lane_while_it_has_one(queue: tuple[str, ...], waits: bool, wanted: str) -> None:
    assert next_file(queue, waits=waits) == wanted


def test_is_waiting_worker_is_true_of_the_last() -> None:
    assert [is_waiting_worker(f"gw{number}", 3) for number in range(3)] == [False, False, True]
