"""LoRA adapters on two pods that share a real etcd: called from either pod by every API, loaded where their base is, replaced without old KV."""

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import openai
import pytest

from tests.e2e.conftest import greedy
from tests.e2e.test_adapters import MAX_TOKENS, PROMPT, adapter, post, text_of
from tests.support import stack, tgis_client
from tests.support.checkpoints import tiny_llama
from tests.support.etcd import EtcdServer
from tests.support.waiting import wait_until
from wire.fmaas import generation_pb2 as fmaas

Pods = tuple[stack.Stack, stack.Stack]


@pytest.fixture(scope="module")
def pods(etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pods]:
    logs, store = tmp_path_factory.mktemp("pods"), f"etcd://{etcd.endpoint}/adapters"
    with (
        stack.serve("--device", "cpu", "--memory", "64MiB", "--store", store, log=logs / "a.log") as a,
        stack.serve("--device", "cpu", "--memory", "64MiB", "--store", store, log=logs / "b.log") as b,
    ):
        yield a, b


@pytest.fixture
def base(pods: Pods, tmp_path: Path) -> Iterator[Path]:
    """A registered base, and an adapter of it by the name of `sql`; both are removed after the test."""
    folder = tiny_llama(tmp_path / "base")
    pods[0].admin.register({"name": "base", "uri": str(folder)})
    yield folder
    for model in pods[0].admin.models():
        pods[0].admin.remove(model.name)


def places(pod: stack.Stack, name: str) -> set[str]:
    """The pods that have the model loaded."""
    return {copy.instance_id for copy in pod.admin.model(name).copies if copy.status == "LOADED"}


def tgis(pod: stack.Stack, model: str, **fields: str) -> str:
    params = fmaas.Parameters(stopping=fmaas.StoppingCriteria(max_new_tokens=MAX_TOKENS))
    request = fmaas.BatchedGenerationRequest(requests=[fmaas.GenerationRequest(text=PROMPT)], params=params, **fields)
    with grpc.insecure_channel(pod.grpc) as channel:
        return tgis_client.generate(channel, request, (("mm-model-id", model),)).responses[0].text


def shown(text: str) -> str:
    return text.rstrip("\ufffd")  # TGIS leaves out an unfinished character


@pytest.mark.parametrize("holder", [0, 1])
def test_adapter_is_loaded_where_its_base_is(pods: Pods, base: Path, tmp_path: Path, holder: int) -> None:
    wanted = adapter(base, tmp_path / "sql", 1)
    assert text_of(pods[holder], "base") == greedy(base, PROMPT, MAX_TOKENS)
    with_base = places(pods[holder], "base")
    assert len(with_base) == 1
    caller = pods[1 - holder]
    caller.admin.register({"name": "sql", "uri": str(tmp_path / "sql"), "adapter_of": "base"})
    assert [text_of(pod, "sql") for pod in (caller, pods[holder])] == [wanted, wanted]
    assert (places(caller, "sql"), places(caller, "base")) == (with_base, with_base)


def test_base_is_loaded_with_the_first_call_of_an_adapter(pods: Pods, base: Path, tmp_path: Path) -> None:
    wanted = adapter(base, tmp_path / "sql", 2)
    pods[0].admin.register({"name": "sql", "uri": str(tmp_path / "sql"), "adapter_of": "base"})
    assert not places(pods[1], "base")
    assert text_of(pods[1], "sql") == wanted
    assert len(places(pods[1], "sql")) == 1
    assert places(pods[1], "sql") == places(pods[1], "base")
    for pod in pods:  # from either pod the base goes, with its adapter, and the next call brings both back
        pod.admin.unload("base")
        wait_until(lambda: not any(places(each, name) for each in pods for name in ("base", "sql")))
        assert text_of(pod, "sql") == wanted
    assert {model.name: model.status for model in pods[0].admin.models()} == {"base": "LOADED", "sql": "LOADED"}


def test_adapter_is_selected_by_every_api_from_either_pod(pods: Pods, base: Path, tmp_path: Path) -> None:
    """Each call finds the adapter unloaded, so that the mesh brings it in."""
    wanted = adapter(base, tmp_path / "sql", 3)
    pods[0].admin.register({"name": "sql", "uri": str(tmp_path / "sql"), "adapter_of": "base"})
    text_of(pods[0], "base")
    for pod in pods:
        client = openai.OpenAI(base_url=f"{pod.url}/v1", api_key="none", max_retries=0, timeout=120)
        for selected in ({"adapter_id": "sql"}, {"lora_request": {"lora_name": "sql", "lora_int_id": 1}}):
            pod.admin.unload("sql")
            answer = client.completions.create(
                model="base", prompt=PROMPT, max_tokens=MAX_TOKENS, temperature=0, extra_body=selected
            )
            assert answer.choices[0].text == wanted, selected
        for field in ("adapter_id", "prefix_id"):
            pod.admin.unload("sql")
            assert shown(tgis(pod, "base", **{field: "sql"})) == shown(wanted), field
        with pytest.raises(grpc.RpcError, match="adapter_id: 'nobody' is not registered"):
            tgis(pod, "base", adapter_id="nobody")
        chat = client.chat.completions.create(
            model="sql", messages=[{"role": "user", "content": "hi"}], max_tokens=4, stream=True
        )
        assert {chunk.model for chunk in chat} == {"sql"}
    assert tgis(pods[1], "base") != tgis(pods[1], "sql")


def test_replaced_adapter_never_meets_old_kv(pods: Pods, base: Path, tmp_path: Path) -> None:
    """The files change under the same name twice: in their place, and by another place. The prompt's KV is cached each time before."""
    folder, texts = tmp_path / "sql", list[str]()
    body = {"lora_name": "sql", "lora_path": str(folder), "base_model_name": "base", "load_inplace": True}
    for seed, pod in ((4, pods[0]), (5, pods[1])):
        texts.append(adapter(base, folder, seed))
        assert post(pod, "/v1/load_lora_adapter", body)[0] == 200
        assert [text_of(each, "sql") for each in (*pods, *pods)] == [texts[-1]] * 4
        assert cached_tokens(pods[0]) > 0
    texts.append(adapter(base, tmp_path / "other", 6))
    pods[1].admin.register({"name": "sql", "uri": str(tmp_path / "other"), "adapter_of": "base"})
    pods[1].admin.load("sql")
    wait_until(lambda: text_of(pods[0], "sql") == texts[-1], 30)
    wait_until(lambda: text_of(pods[1], "sql") == texts[-1], 30)
    assert len(set(texts)) == 3


def cached_tokens(pod: stack.Stack) -> int:
    """How many of the prompt's tokens a call found cached."""
    body = {"model": "sql", "prompt": PROMPT, "max_tokens": 1}
    request = urllib.request.Request(f"{pod.url}/v1/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        return int((json.load(answer)["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0))
