"""How long a request of a large model waits while many small models have requests all the time."""

import pytest

from tests.support.engine_stage import Answer, Stage
from tests.support.fake_backend import FakeBackend
from tests.support.fake_specs import FakeSpec

SMALL = ("s0", "s1", "s2", "s3", "s4")


@pytest.mark.parametrize("tokens", [20, 60])
def test_large_model_gets_its_turn_among_small_ones(tokens: int) -> None:
    """Each small model could take what another one releases before the large model has all that it needs."""
    specs = {name: FakeSpec(3, eos=(), max_model_len=64) for name in SMALL}
    specs["large"] = FakeSpec(9, eos=(), max_model_len=32)
    stage = Stage(FakeBackend(specs, total_slabs=12), turn_s=0.02, wait_budget_s=1000.0)
    for name in specs:
        stage.load(name)
    stage.until_quiet()
    assert not stage.failures()
    small: dict[str, Answer] = {}

    def keep_small_ones_busy(seconds: float, until: Answer | None = None) -> None:
        end_s = stage.now + seconds
        while stage.now < end_s and (until is None or until.last is None):
            for name in SMALL:
                if name not in small or small[name].last is not None:
                    small[name] = stage.add(name, [5], tokens)
            stage.turn()

    keep_small_ones_busy(10)
    answer = stage.add("large", [7], 2)
    keep_small_ones_busy(30, answer)
    assert answer.last is not None, "it waited for more than 30 s"
    assert answer.last.error is None
    stage.until_quiet()
    assert all(one.last is not None and one.last.error is None for one in small.values())
    stage.check_all()
    stage.close()
