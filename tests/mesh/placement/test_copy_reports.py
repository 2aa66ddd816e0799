"""The reports of copies in a pod's record, kept from one record to the next."""

from hypothesis import given
from hypothesis import strategies as st

from common.model_state import CopyState, ModelState
from mesh.placement.copies import LocalCopy
from mesh.placement.copy_reports import CopyReports
from mesh.types import ModelInfo

NAMES = st.sampled_from("mno")
MODELS = st.dictionaries(
    NAMES, st.builds(ModelState, state=st.sampled_from(CopyState), running=st.integers(0, 2), progress=st.floats(0, 1))
)
COPIES = st.dictionaries(NAMES, st.tuples(st.sampled_from(CopyState), st.integers(0, 2)))


@given(st.lists(st.tuples(COPIES, MODELS), max_size=5))
def test_reports_equal_those_made_from_nothing(
    turns: list[tuple[dict[str, tuple[CopyState, int]], dict[str, ModelState]]],
) -> None:
    kept = CopyReports()
    for copies, models in turns:
        held = [
            LocalCopy(name, ModelInfo("llm", "/m"), state, size_bytes) for name, (state, size_bytes) in copies.items()
        ]
        fresh = CopyReports()
        for reports in (kept, fresh):
            reports.update(held, models)
        assert kept.reports() == fresh.reports()
        assert kept.settled() == fresh.settled()
        assert kept.reports().keys() == copies.keys()


def test_reports_of_unchanged_copies_are_the_same_objects() -> None:
    reports, models = CopyReports(), {name: ModelState(model_id=name, running=3) for name in ("m", "n")}
    copies = [LocalCopy(name, ModelInfo("llm", "/m"), CopyState.LOADED) for name in models]
    reports.update(copies, models)
    before = reports.reports()
    reports.update(copies, {**models, "n": ModelState(model_id="n", running=4)})
    assert reports.reports()["m"] is before["m"]
    assert (before["n"].running, reports.reports()["n"].running, reports.settled()["n"].running) == (3, 4, 0)
