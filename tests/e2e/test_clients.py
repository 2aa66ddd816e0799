"""One machine, from the outside: each HTTP protocol through the client that its users have gives the same text."""

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ollama
import pytest
import tritonclient.http as triton
from huggingface_hub import InferenceClient

from tests.e2e.conftest import greedy
from tests.support import stack

PROMPT = "The company keeps many plays ready"
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def named(served: stack.Stack, models: dict[str, Path]) -> stack.Stack:
    for name, folder in models.items():
        served.admin.register({"name": f"org/{name}", "uri": str(folder)})
    return served


def with_triton(served: stack.Stack, name: str) -> str:
    with triton.InferenceServerClient(served.url.removeprefix("http://")) as client:
        assert client.is_server_ready()
        assert client.is_model_ready(name)
        tensor = triton.InferInput("text_input", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([PROMPT.encode()], dtype=object))
        answer = client.infer(name, [tensor], parameters={"max_tokens": NUM_TOKENS, "temperature": 0})
        text: bytes = answer.as_numpy("text_output")[0]
        return text.decode()


def with_hub_client(served: stack.Stack, name: str) -> str:
    client = InferenceClient(model=f"{served.url}/tgi/{name}", token="none")
    asked: Any = {"max_new_tokens": NUM_TOKENS, "return_full_text": False}
    events = client.text_generation(PROMPT, **asked, stream=True, details=True)
    streamed = [event.generated_text for event in events][-1]
    assert client.text_generation(PROMPT, **asked) == streamed
    return str(streamed)


def with_ollama(served: stack.Stack, name: str) -> str:
    client = ollama.Client(host=served.url)
    assert name in {model.model for model in client.list().models}
    options = {"num_predict": NUM_TOKENS, "temperature": 0}
    lines = client.generate(model=f"{name}:latest", prompt=PROMPT, raw=True, options=options, stream=True)
    text = "".join(line.response or "" for line in lines)
    assert name in {model.model for model in client.ps().models}
    return text


@pytest.mark.parametrize("ask", [with_triton, with_hub_client, with_ollama])
def test_protocols_give_the_text_of_transformers(
    named: stack.Stack, models: dict[str, Path], ask: Callable[[stack.Stack, str], str]
) -> None:
    for name, folder in models.items():
        assert ask(named, f"org/{name}") == greedy(folder, PROMPT, NUM_TOKENS)


def test_ollama_unloads_a_model(named: stack.Stack) -> None:
    client = ollama.Client(host=named.url)
    client.generate(model="org/ada", prompt="")
    assert "org/ada" in {model.model for model in client.ps().models}
    client.generate(model="org/ada", prompt="", keep_alive=0)
    assert "org/ada" not in {model.model for model in client.ps().models}


def test_openapi_joins_the_mesh_and_the_runtime(named: stack.Stack) -> None:
    with urllib.request.urlopen(f"{named.url}/openapi.json") as answer:
        document = json.loads(answer.read())
    assert "ChatBody" in document["components"]["schemas"]
    for path in ("/v1/chat/completions", "/v2/models/{name}/infer", "/tgi/{name}/generate", "/api/chat"):
        assert "$ref" in document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert document["paths"]["/admin/v1/pods"]["get"]["summary"].startswith("List all pods")
