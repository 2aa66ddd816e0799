"""Two pods that share a real etcd: each sees what the other registered, and a call for a model that the other has goes there in one hop."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import stack
from tests.e2e.conftest import greedy
from tests.e2e.test_serve import PROMPT, client_of, stream_text
from tests.support.etcd import EtcdServer


@pytest.fixture(scope="module")
def pods(etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[stack.Stack, stack.Stack]]:
    base = tmp_path_factory.mktemp("pods")
    store = f"etcd://{etcd.endpoint}"
    with (
        stack.serve("--memory", "64MiB", "--store", store, log=base / "a.log") as a,
        stack.serve("--memory", "64MiB", "--store", store, log=base / "b.log") as b,
    ):
        yield a, b


def test_a_model_registered_at_one_pod_answers_at_the_other(pods: tuple[stack.Stack, stack.Stack], models: dict[str, Path]) -> None:
    a, b = pods
    stack.load_and_wait(a, "ada", str(models["ada"]))
    assert stream_text(b, "ada", PROMPT, 24) == greedy(models["ada"], PROMPT, 24)
    # it was forwarded, not loaded a second time
    assert len(b.admin.model("ada").copies) == 1


def test_both_pods_list_the_same_models(pods: tuple[stack.Stack, stack.Stack], models: dict[str, Path]) -> None:
    a, b = pods
    b.admin.register({"name": "bob", "uri": str(models["bob"])})
    assert {model.id for model in client_of(a).models.list()} >= {"ada", "bob"}
