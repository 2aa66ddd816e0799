"""A process that is tied to the one that started it."""

import os
import subprocess
import sys

import pytest

from common.parent import PARENT_VARIABLE, child_environment

CHILD = [sys.executable, "-c", "from common.parent import die_with_parent; die_with_parent(); print('lives')"]


def test_child_of_a_living_parent_lives() -> None:
    assert subprocess.run(CHILD, env=child_environment(), capture_output=True, check=True).stdout == b"lives\n"


@pytest.mark.parametrize("parent", [1, 2**30])
def test_child_whose_parent_ended_before_the_call_ends(parent: int) -> None:
    environment = {**os.environ, PARENT_VARIABLE: str(parent)}
    done = subprocess.run(CHILD, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (1, b"")
