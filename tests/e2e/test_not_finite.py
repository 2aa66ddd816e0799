"""A model that computes no numbers: each protocol says so, names the model, and other models go on."""

import json
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import stack, tgis_client
from tests.support.checkpoints import tiny_llama
from wire.fmaas import generation_pb2 as fmaas

MATRIX = "model.layers.1.mlp.down_proj.weight"
BAD = 60  # the token whose embedding is not finite
TEXT = "infinite or not a number"


def spoil(folder: Path, name: str, row: int) -> Path:
    """Put a NaN in one row of a tensor of the checkpoint."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights[name][row, 3] = torch.nan
    save_file(weights, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def spoilt(served: stack.Stack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A loaded model, "spoilt", with a NaN in its last layer. Unquantised weights are used as they lie, and not looked at."""
    folder = spoil(tiny_llama(tmp_path_factory.mktemp("spoilt") / "m", seed=4), MATRIX, 3)
    stack.load_and_wait(served, "spoilt", str(folder))
    return folder


def post(served: stack.Stack, path: str, body: dict[str, object]) -> tuple[int, str]:
    request = urllib.request.Request(served.url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.usefixtures("spoilt")
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", {"prompt": "hi", "temperature": 0}),
        ("/v1/completions", {"prompt": "hi", "echo": True, "logprobs": 1, "max_tokens": 0}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}),
        ("/v1/responses", {"input": "hi"}),
        ("/api/generate", {"prompt": "hi", "stream": False}),
    ],
)
def test_answer_without_finite_logits_is_500(served: stack.Stack, path: str, body: dict[str, object]) -> None:
    status, text = post(served, path, {"model": "spoilt", **body})
    assert (status, TEXT in text, "spoilt" in text) == (500, True, True), text


def test_stream_that_meets_such_logits_later_ends_with_an_error_event(served: stack.Stack, tmp_path: Path) -> None:
    folder = spoil(tiny_llama(tmp_path / "late", seed=5), "model.embed_tokens.weight", BAD)
    stack.load_and_wait(served, "late", str(folder))
    asked = {"model": "late", "messages": [{"role": "user", "content": "hi"}], "stream": True, "seed": 1}
    status, text = post(served, "/v1/chat/completions", {**asked, "allowed_token_ids": [BAD], "max_tokens": 9})
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]
    assert status == 200
    contents = [choice["delta"].get("content") for event in events for choice in event.get("choices", ())]
    assert len("".join(filter(None, contents))) == 1
    assert TEXT in events[-1]["error"]["message"]
    assert "late" in events[-1]["error"]["message"]
    status, _ = post(
        served, "/v1/chat/completions", {**asked, "stream": False, "allowed_token_ids": [BAD - 1], "max_tokens": 9}
    )
    assert status == 200


@pytest.mark.usefixtures("spoilt")
def test_grpc_answer_without_finite_logits_is_internal(served: stack.Stack) -> None:
    request = fmaas.BatchedGenerationRequest(model_id="spoilt", requests=[fmaas.GenerationRequest(text="hi")])
    with grpc.insecure_channel(served.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        tgis_client.generate(channel, request, (("mm-model-id", "spoilt"),))
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert TEXT in (caught.value.details() or "")


def test_load_of_quantised_weights_names_the_tensor(served: stack.Stack, spoilt: Path) -> None:
    with pytest.raises(RuntimeError, match=f"tensor {MATRIX} has values that are"):
        stack.load_and_wait(served, "packed", str(spoilt), quantize="int8")
    stack.load_and_wait(served, "fine", str(tiny_llama(spoilt.parent / "fine", seed=5)), quantize="int8")
    assert post(served, "/v1/completions", {"model": "fine", "prompt": "hi"})[0] == 200
