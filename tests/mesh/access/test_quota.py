"""Limits of a key: a rate with a small burst, and a number of running requests."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.access.api_keys import ApiKey, digest_of
from mesh.access.quota import Quotas
from mesh.access.scopes import Scope
from mesh.errors import Overloaded


def key(rate: int = 0, concurrent: int = 0, name: str = "k") -> ApiKey:
    return ApiKey(
        name,
        frozenset({digest_of(name)}),
        frozenset({Scope.INFERENCE}),
        requests_per_minute=rate,
        max_concurrent=concurrent,
    )


@given(st.integers(1, 10_000), st.lists(st.floats(0.001, 30.0), max_size=200))
def test_quota_admits_no_more_than_the_rate_and_one_burst(rate: int, pauses: list[float]) -> None:
    now_s = 0.0
    quotas = Quotas(lambda: now_s)
    for admitted, pause_s in enumerate(pauses, 1):
        now_s += pause_s
        try:
            quotas.begin(key(rate))
        except Overloaded as error:
            # The hint is right: a caller that waits so long is admitted.
            now_s += (error.retry_after_s or 0.0) + 1e-6
            quotas.begin(key(rate))
        assert admitted <= now_s * rate / 60 + max(1, rate / 6) + 1e-6


def test_quota_of_one_key_leaves_others_alone() -> None:
    quotas = Quotas(lambda: 0.0)
    quotas.begin(key(1))
    with pytest.raises(Overloaded, match="more than 1 requests per minute"):
        quotas.begin(key(1))
    quotas.begin(key(1, name="other"))
    assert quotas.begin(key()) is None


def test_quota_counts_running_requests_until_they_end() -> None:
    quotas = Quotas(lambda: 0.0)
    first, second = quotas.begin(key(concurrent=2)), quotas.begin(key(concurrent=2))
    assert first is not None
    assert second is not None
    with pytest.raises(Overloaded, match="2 requests are running; the limit is 2"):
        quotas.begin(key(concurrent=2))
    first()
    first()
    quotas.begin(key(concurrent=2))
    with pytest.raises(Overloaded):
        quotas.begin(key(concurrent=2))


def test_quota_survives_a_change_of_the_limit() -> None:
    quotas = Quotas(lambda: 0.0)
    quotas.begin(key(concurrent=1))
    with pytest.raises(Overloaded):
        quotas.begin(key(concurrent=1))
    quotas.begin(key(concurrent=2))
