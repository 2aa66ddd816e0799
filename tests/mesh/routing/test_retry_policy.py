"""Retry budget: how many attempts follow which failures."""

from hypothesis import given
from hypothesis import strategies as st

from mesh.routing.retry_policy import Failure, RetryBudget

budgets = st.builds(
    RetryBudget,
    local_only=st.booleans(),
    reloads=st.integers(0, 3),
    failovers=st.integers(0, 3),
    status_retries=st.integers(0, 3),
)
failures = st.lists(st.tuples(st.sampled_from(Failure), st.sampled_from("abc")), max_size=30)


def run(budget: RetryBudget, ended: list[tuple[Failure, str]]) -> list[RetryBudget]:
    """Return the budget of each attempt, when the attempts end like this one after the other."""
    spent = [budget]
    for failure, instance_id in ended:
        following = spent[-1].after(failure, instance_id)
        if following is None:
            break
        spent.append(following)
    return spent


@given(budgets, failures)
def test_retry_budget_bounds_the_attempts(budget: RetryBudget, ended: list[tuple[Failure, str]]) -> None:
    attempts = run(budget, ended)
    assert len(attempts) <= budget.max_attempts
    assert [each.max_attempts for each in attempts] == [budget.max_attempts - spent for spent in range(len(attempts))]
    unavailable = [instance_id for failure, instance_id in ended[: len(attempts) - 1] if failure is Failure.UNAVAILABLE]
    assert len(unavailable) == len(set(unavailable)), "no copy gets a request after it was unavailable twice"


@given(failures)
def test_retry_budget_excludes_only_after_unavailable(ended: list[tuple[Failure, str]]) -> None:
    attempts = run(RetryBudget(), ended)
    for (failure, instance_id), before, after in zip(ended, attempts, attempts[1:], strict=False):
        expected = before.exclude | {instance_id} if failure is Failure.UNAVAILABLE else before.exclude
        assert after.exclude == expected


@given(failures)
def test_retry_budget_of_a_forwarded_request_never_fails_over(ended: list[tuple[Failure, str]]) -> None:
    budget = RetryBudget(local_only=True)
    assert all(not attempt.exclude for attempt in run(budget, ended))
    assert budget.after(Failure.UNAVAILABLE, "a") is None
    assert budget.after_move() is None


def test_retry_budget_after_a_move_allows_one_more_reload() -> None:
    lost = RetryBudget(reloads=1).after(Failure.MODEL_LOST, "a")
    assert lost is not None
    assert lost.after(Failure.MODEL_LOST, "a") is None
    moved = lost.after_move()
    assert moved is not None
    assert moved.after(Failure.MODEL_LOST, "a") is not None
    assert moved.after_move() is None
