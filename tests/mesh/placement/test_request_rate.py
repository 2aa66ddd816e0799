"""Requests per minute of a pod."""

from hypothesis import given
from hypothesis import strategies as st

from mesh.placement.request_rate import RequestRate


@given(st.integers(1, 20), st.floats(600, 5000))
def test_request_rate_is_that_of_a_steady_load(per_second: int, until_s: float) -> None:
    rate = RequestRate(0.0)
    for second in range(int(until_s) - 500, int(until_s)):
        for _ in range(per_second):
            rate.add(float(second))
    assert abs(rate.per_minute(until_s) - 60 * per_second) <= 60 * per_second / 100 + 1


def test_request_rate_forgets_what_is_older_than_seven_minutes() -> None:
    rate = RequestRate(0.0)
    for _ in range(70):
        rate.add(10.0)
    assert rate.per_minute(10.0) == 70, "the first minute counts as a whole"
    assert rate.per_minute(419.0) == 10
    assert rate.per_minute(420.0) == 0
