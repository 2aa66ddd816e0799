"""What the counts of carried calls say about the runtime: never more overdue calls than there are, and all of them once it answers none."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from mesh.routing.carried_answers import PATIENCE_S, CarriedAnswers, CarriedCount


@dataclass(frozen=True)
class Call:
    begun_s: float
    ended_s: float
    is_answered: bool


calls = st.builds(
    lambda begun_s, seconds, is_answered: Call(begun_s, begun_s + seconds, is_answered),
    st.floats(0, 10),
    st.floats(0, 10),
    st.booleans(),
)


def count_at(each: list[Call], now_s: float) -> CarriedCount:
    return CarriedCount(
        "m",
        begun=sum(call.begun_s <= now_s for call in each),
        active=sum(call.begun_s <= now_s < call.ended_s for call in each),
        answered=sum(call.is_answered and call.ended_s <= now_s for call in each),
    )


@given(st.lists(calls, max_size=12), st.lists(st.floats(0, 20), min_size=1, max_size=20).map(sorted))
def test_carried_answers_never_exceed_the_calls_that_wait(each: list[Call], noted_s: list[float]) -> None:
    answers = CarriedAnswers()
    for now_s in noted_s:
        answers.note({"series": count_at(each, now_s)}, now_s)
        waiting = sum(call.begun_s <= now_s - PATIENCE_S and call.ended_s > now_s for call in each)
        assert answers.overdue.get("m", 0) <= waiting


@given(st.lists(st.floats(0, 5), min_size=1, max_size=12), st.floats(0.1, 1.0))
def test_carried_answers_find_all_calls_of_a_silent_runtime(begun_s: list[float], every_s: float) -> None:
    answers, each = CarriedAnswers(), [Call(at_s, 1e9, is_answered=False) for at_s in begun_s]
    now_s = 0.0
    while now_s < 5 + PATIENCE_S + every_s:
        now_s += every_s
        answers.note({"series": count_at(each, now_s)}, now_s)
    assert answers.overdue == {"m": len(each)}
    assert answers.answered_s == 0.0


@given(st.integers(1, 9), st.integers(0, 9))
def test_given_up_calls_do_not_count_and_later_ones_do(num_before: int, num_after: int) -> None:
    answers = CarriedAnswers()
    for now_s in (0.0, PATIENCE_S):
        answers.note({"series": CarriedCount("m", num_before, num_before, 0)}, now_s)
    answers.give_up()
    assert not answers.overdue
    num_active = num_before + num_after
    for now_s in (2.0, 2.0 + PATIENCE_S):
        answers.note({"series": CarriedCount("m", num_active, num_active, 0)}, now_s)
    assert answers.overdue.get("m", 0) == num_after


def test_answer_is_noted_and_an_abandoned_call_is_not() -> None:
    answers = CarriedAnswers()
    answers.note({"series": CarriedCount("m", 2, 2, 0)}, 1.0)
    answers.note({"series": CarriedCount("m", 2, 1, 0)}, 2.0)
    assert answers.answered_s == 0.0
    answers.note({"series": CarriedCount("m", 2, 0, 1)}, 3.0)
    assert answers.answered_s == 3.0


def test_counts_of_a_restarted_process_begin_again() -> None:
    answers = CarriedAnswers()
    answers.note({"series": CarriedCount("m", 9, 5, 4)}, 1.0)
    answers.note({"series": CarriedCount("m", 3, 3, 0)}, 2.0)
    assert not answers.overdue
    answers.note({}, 3.0)
    assert not answers.overdue
