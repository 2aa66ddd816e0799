"""The order in which pods are asked to load a model without a store is the same for every pod, and fair to their sizes."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from mesh.placement.outage_plan import OutageView, order_pods

views = st.lists(
    st.builds(
        OutageView, st.sampled_from("abcdef"), st.integers(0, 1 << 40), has_base=st.booleans(), has_files=st.booleans()
    ),
    unique_by=lambda view: view.instance_id,
    max_size=6,
)


@given(views, st.text(max_size=8), st.randoms())
def test_order_pods_does_not_depend_on_which_pod_computes_it(
    pods: list[OutageView], model_id: str, rng: object
) -> None:
    mixed = sorted(pods, key=lambda _: rng.random())  # type: ignore[attr-defined]
    assert order_pods(mixed, model_id) == order_pods(pods, model_id)
    assert sorted(order_pods(pods, model_id)) == sorted(pod.instance_id for pod in pods)


@given(views, st.text(max_size=8))
def test_order_pods_keeps_the_order_of_the_others_when_a_pod_is_gone(pods: list[OutageView], model_id: str) -> None:
    order = order_pods(pods, model_id)
    for gone in pods:
        left = [pod for pod in pods if pod is not gone]
        assert order_pods(left, model_id) == tuple(pod_id for pod_id in order if pod_id != gone.instance_id)


@given(views, st.text(max_size=8))
def test_order_pods_prefers_the_base_and_then_the_files(pods: list[OutageView], model_id: str) -> None:
    by_id = {pod.instance_id: pod for pod in pods}
    ranks = [(not by_id[pod_id].has_base, not by_id[pod_id].has_files) for pod_id in order_pods(pods, model_id)]
    assert ranks == sorted(ranks)


def test_order_pods_gives_each_pod_its_share_of_the_capacity() -> None:
    pods = [OutageView("a", 100), OutageView("b", 200), OutageView("c", 100)]
    first = Counter(order_pods(pods, f"model{number}")[0] for number in range(4000))
    assert 0.45 < first["b"] / 4000 < 0.55
    assert 0.2 < first["a"] / 4000 < 0.3
