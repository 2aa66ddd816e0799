"""Two pods that share a real etcd: each sees what the other registered, and a call for a model that the other has goes there in one hop."""

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest

from tests.e2e.conftest import greedy
from tests.e2e.test_serve import PROMPT, client_of, stream_text
from tests.support import stack
from tests.support.etcd import EtcdServer


@pytest.fixture(scope="module")
def pods(etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[stack.Stack, stack.Stack]]:
    base = tmp_path_factory.mktemp("pods")
    store = f"etcd://{etcd.endpoint}"
    with (
        stack.serve("--device", "cpu", "--memory", "64MiB", "--store", store, log=base / "a.log") as a,
        stack.serve("--device", "cpu", "--memory", "64MiB", "--store", store, log=base / "b.log") as b,
    ):
        yield a, b


def test_model_registered_at_one_pod_answers_at_the_other(
    pods: tuple[stack.Stack, stack.Stack], models: dict[str, Path]
) -> None:
    a, b = pods
    stack.load_and_wait(a, "ada", str(models["ada"]))
    assert stream_text(b, "ada", PROMPT, 24) == greedy(models["ada"], PROMPT, 24)
    # it was forwarded, not loaded a second time
    assert len(b.admin.model("ada").copies) == 1


def test_pods_list_the_same_models(pods: tuple[stack.Stack, stack.Stack], models: dict[str, Path]) -> None:
    a, b = pods
    b.admin.register({"name": "bob", "uri": str(models["bob"])})
    assert {model.id for model in client_of(a).models.list()} >= {"ada", "bob"}


def test_pod_that_was_killed_is_replaced_by_the_next_request(
    pods: tuple[stack.Stack, stack.Stack], models: dict[str, Path]
) -> None:
    a, b = pods
    a.admin.register({"name": "cyd", "uri": str(models["cyd"])})
    loaded = {name: stream_text(a, name, PROMPT, 8) for name in ("ada", "bob", "cyd")}
    # one stream that is under way on the pod that dies, called through the other
    lost = client_of(b).completions.create(
        model="ada", prompt=PROMPT, max_tokens=450, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(lost))
    processes = [psutil.Process(a.pid), *psutil.Process(a.pid).children(recursive=True)]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=20)
    with pytest.raises(openai.APIError):
        for _ in lost:
            pass
    assert {name: stream_text(b, name, PROMPT, 8) for name in loaded} == loaded
    # what the dead pod had stays on record until its session ends
    for name in loaded:
        assert _pod_id(b) in {copy.instance_id for copy in b.admin.model(name).copies if copy.state == "loaded"}


def _pod_id(pod: stack.Stack) -> str:
    """Named after its host and its gRPC port."""
    pods = json.loads(pod.admin.call("GET", "/admin/v1/pods"))["pods"]
    return str(next(entry["instance_id"] for entry in pods if pod.grpc in entry["grpc_address"]))
