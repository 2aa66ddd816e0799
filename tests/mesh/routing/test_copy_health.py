"""What a pod's own requests say about copies."""

import time

from hypothesis import given
from hypothesis import strategies as st

from mesh.routing.attempts import Attempt
from mesh.routing.copy_health import CopyHealth
from mesh.routing.retry_policy import Failure
from mesh.types import Target

COPIES = [(model_id, pod_id) for model_id in ("m", "n") for pod_id in ("a", "b")]
STEPS = st.tuples(st.sampled_from(COPIES), st.sampled_from(["answered", "failed", "forgotten"]))


def end(health: CopyHealth, model_id: str, pod_id: str, how: str) -> None:
    if how == "forgotten":
        health.forget(model_id)
        return
    attempt = Attempt(model_id, Target(pod_id, False, "grpc", "http"))
    if how == "failed":
        attempt.failure = Failure.UNAVAILABLE
    else:
        attempt.begin_response()
    health.record(attempt)


@given(st.lists(STEPS, max_size=20))
def test_clean_health_has_no_copy_that_failed_last(steps: list[tuple[tuple[str, str], str]]) -> None:
    health = CopyHealth()
    for copy, how in steps:
        end(health, *copy, how)
        failing = [each for each in COPIES if health.of(*each).failures]
        ejected = [each for each in COPIES if health.is_ejected(*each, time.monotonic())]
        assert not (health.is_clean and (failing or ejected))
    for copy in COPIES:
        end(health, *copy, "answered")
    assert health.is_clean
