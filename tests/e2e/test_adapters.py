"""LoRA adapters from the outside: registered by name over a base, called by the official OpenAI client and by a TGIS client."""

import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import msgspec
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mesh.errors import MeshError
from runtime.checkpoint.fp8 import quantize_rows
from tests.e2e.conftest import greedy
from tests.runtime.puller.pack.test_packer import serialise_fp8
from tests.support import stack, tgis_client
from tests.support.adapters import peft_model, save_adapter
from tests.support.checkpoints import tiny_llama
from tests.support.waiting import wait_until
from wire.fmaas import generation_pb2 as fmaas

PROMPT = "The company keeps many plays ready"
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[stack.Stack]:
    log = tmp_path_factory.mktemp("log") / "serve.log"
    with stack.serve("--device", "cpu", "--memory", "64MiB", log=log) as running:
        running.admin.register({"name": "base", "uri": str(base)})
        yield running


def adapter(base: Path, folder: Path, seed: int) -> str:
    """Save an adapter of `base` in `folder`. Returns the text that PEFT's own forward gives."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = peft_model(model, seed=seed, r=4, lora_alpha=8)
    save_adapter(wrapped, folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        made = wrapped.generate(**ids, max_new_tokens=MAX_TOKENS, do_sample=False)  # type: ignore[no-untyped-call]
    text: str = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def text_of(served: stack.Stack, model: str) -> str:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120)
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=MAX_TOKENS, temperature=0)
    assert answer.model == model
    return answer.choices[0].text


def post(served: stack.Stack, path: str, body: Mapping[str, object]) -> tuple[int, str]:
    request = urllib.request.Request(served.url + path, msgspec.json.encode(body), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_names_are_answered_as_peft_does_beside_their_base(served: stack.Stack, base: Path, tmp_path: Path) -> None:
    wanted = {"base": greedy(base, PROMPT, MAX_TOKENS)}
    for seed, name in enumerate(("sql", "legal", "poems")):
        wanted[name] = adapter(base, tmp_path / name, seed)
        served.admin.register({"name": name, "uri": str(tmp_path / name), "adapter_of": "base"})
    assert len(set(wanted.values())) == 4
    with ThreadPoolExecutor(16) as threads:
        asked = [*wanted] * 4
        assert list(threads.map(lambda name: text_of(served, name), asked)) == [wanted[name] for name in asked]
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
    listed = {model.id: model.to_dict() for model in client.models.list()}
    parents = {name: entry.get("parent") for name, entry in listed.items()}
    assert parents == {"base": None, "sql": "base", "legal": "base", "poems": "base"}
    assert {name: entry["root"] for name, entry in listed.items()} == {
        "base": str(base), **{name: str(tmp_path / name) for name in ("sql", "legal", "poems")},
    }  # fmt: skip
    assert served.admin.model("sql").settings == {"adapter_of": "base"}
    assert served.admin.model("sql").status == "LOADED"


def test_metrics_and_state_know_adapters(served: stack.Stack, base: Path, tmp_path: Path) -> None:
    wanted = adapter(base, tmp_path / "known", 9)
    served.admin.register({"name": "known", "uri": str(tmp_path / "known"), "adapter_of": "base"})
    fits = served.admin.fit({"uri": str(tmp_path / "known"), "adapter_of": "base"})
    assert text_of(served, "known") == wanted

    def scraped() -> str:
        with urllib.request.urlopen(f"{served.url}/metrics", timeout=20) as answer:
            return str(answer.read().decode())

    labels = 'adapter_name="known",level="gpu",model_name="base",pinned="false",rank="4"'
    wait_until(lambda: f"vllm:lora_adapter_loaded{{{labels}}} 1.0" in scraped())
    assert 'vllm:lora_requests_info{max_lora="64",running_lora_adapters=' in scraped()
    wait_until(lambda: served.admin.model("known").tier == "device")
    view = served.admin.model("known")
    assert view.copies[0].path.startswith("adapter of rank 4 over ")
    assert (fits.fits, fits.weight_bytes) == (True, view.weight_bytes)


def test_adapter_is_unloaded_with_its_base_and_brings_it_back(served: stack.Stack, base: Path, tmp_path: Path) -> None:
    wanted = adapter(base, tmp_path / "back", 7)
    served.admin.register({"name": "back", "uri": str(tmp_path / "back"), "adapter_of": "base"})
    assert text_of(served, "back") == wanted
    served.admin.unload("base")
    assert {served.admin.model(name).status for name in ("base", "back")} == {"NOT_LOADED"}
    assert text_of(served, "back") == wanted
    assert served.admin.model("base").status == "LOADED"


def test_vllms_routes_load_replace_and_unload(served: stack.Stack, base: Path, tmp_path: Path) -> None:
    wanted = adapter(base, tmp_path / "a", 11)
    body = {"lora_name": "dynamic", "lora_path": str(tmp_path / "a")}
    assert post(served, "/v1/load_lora_adapter", body) == (
        200,
        "Success: LoRA adapter 'dynamic' added successfully.",
    )
    assert text_of(served, "dynamic") == wanted
    status, text = post(served, "/v1/load_lora_adapter", body)
    assert (status, "already been loaded" in text) == (400, True)
    replaced = adapter(base, tmp_path / "a", 12)
    assert replaced != wanted
    assert post(served, "/v1/load_lora_adapter", {**body, "load_inplace": True})[0] == 200
    assert text_of(served, "dynamic") == replaced
    assert post(served, "/v1/unload_lora_adapter", {"lora_name": "dynamic"})[0] == 200
    with pytest.raises(openai.NotFoundError):
        text_of(served, "dynamic")
    status, text = post(served, "/v1/unload_lora_adapter", {"lora_name": "dynamic"})
    assert (status, "cannot be found" in text) == (404, True)
    status, text = post(served, "/v1/unload_lora_adapter", {"lora_name": "base"})
    assert status == 404
    status, text = post(served, "/v1/load_lora_adapter", {"lora_name": "bad", "lora_path": str(tmp_path / "none")})
    assert status >= 400
    with pytest.raises(MeshError):
        served.admin.model("bad")


def test_registrations_over_no_base_are_refused(served: stack.Stack, base: Path, tmp_path: Path) -> None:
    adapter(base, tmp_path / "x", 3)
    with pytest.raises(MeshError, match="adapter_of: 'nobody' is not registered"):
        served.admin.register({"name": "x", "uri": str(tmp_path / "x"), "adapter_of": "nobody"})
    served.admin.register({"name": "over", "uri": str(tmp_path / "x"), "adapter_of": "base"})
    with pytest.raises(MeshError, match="'over' is an adapter itself"):
        served.admin.register({"name": "x", "uri": str(tmp_path / "x"), "adapter_of": "over"})
    served.admin.register({"name": "x", "uri": str(tmp_path / "x")})
    with pytest.raises(openai.APIStatusError, match="adapter_of"):
        text_of(served, "x")


@pytest.mark.parametrize("stored", ["quantised while loading", "fp8 checkpoint"])
def test_adapter_over_an_fp8_base_is_that_over_its_dequantised_weights(
    served: stack.Stack, base: Path, tmp_path: Path, stored: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    uri = base
    if stored == "fp8 checkpoint":
        uri = tmp_path / "fp8"
        exact = serialise_fp8(model, base, uri, "channel")
    else:
        codes = {name: quantize_rows(weight) for name, weight in model.state_dict().items() if "_proj" in name}
        exact = {name: values.float() * scale for name, (values, scale) in codes.items()}
    model.load_state_dict(exact, strict=False)
    model.save_pretrained(tmp_path / "exact")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "exact")
    wanted = adapter(tmp_path / "exact", tmp_path / "adapter", 21)
    name = stored.replace(" ", "-")
    quantize = {} if stored == "fp8 checkpoint" else {"quantize": "fp8"}
    served.admin.register({"name": name, "uri": str(uri), **quantize})
    served.admin.register({"name": f"{name}-sql", "uri": str(tmp_path / "adapter"), "adapter_of": name})
    assert text_of(served, f"{name}-sql") == wanted
    wait_until(lambda: served.admin.model(name).quantization == "fp8")  # the mesh learns of the runtime's state later
    assert text_of(served, name) != wanted


def test_tgis_names_an_adapter(served: stack.Stack, base: Path, tmp_path: Path) -> None:
    wanted = adapter(base, tmp_path / "tgis", 5)
    served.admin.register({"name": "tgis", "uri": str(tmp_path / "tgis"), "adapter_of": "base"})
    assert text_of(served, "tgis") == wanted
    params = fmaas.Parameters(stopping=fmaas.StoppingCriteria(max_new_tokens=MAX_TOKENS))
    for field in ("adapter_id", "prefix_id"):
        request = fmaas.BatchedGenerationRequest(
            requests=[fmaas.GenerationRequest(text=PROMPT)], params=params, **{field: "tgis"}
        )
        with grpc.insecure_channel(served.grpc) as channel:
            answer = tgis_client.generate(channel, request, (("mm-model-id", "base"),))
        assert answer.responses[0].text.rstrip("\ufffd") == wanted.rstrip(
            "\ufffd"
        )  # TGIS leaves out an unfinished character
