"""POST /v1/embeddings with the official client: forms of the input and of the vectors, and models that make none."""

import base64
import json
import os
import struct
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import openai
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from runtime.api.openai.embeddings import shortened
from runtime.errors import LoadFailed
from runtime.text.embedding import Embedding, read_embedding
from runtime.types import FinishReason, Pooling
from tests.support import tokenizers as tiny
from tests.support.openai_server import Server, serve
from tests.support.scripted_engine import ScriptedEngine, served

LAST = {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}
MODULES = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))]  # fmt: skip


def module(kind: str, path: str) -> dict[str, str]:
    return {"type": f"sentence_transformers.models.{kind}", "path": path}


PROMPTS: Any = {"prompts": {"query": "The dog: ", "document": ""}, "default_prompt_name": "document"}


def embedding_model(folder: Path, pooling: Any = LAST, modules: Any = None, prompts: Any = None) -> Path:
    path = tiny.byte_level(folder)
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if modules is not None:
        (path / "modules.json").write_text(json.dumps(modules))
    if prompts is not None:
        (path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return path


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    made = served(embedding_model(tmp_path / "m", modules=MODULES), "m1", max_model_len=40)
    plain = served(tiny.byte_level(tmp_path / "plain"), "m2")
    mean = served(embedding_model(tmp_path / "mean", {"pooling_mode_mean_tokens": True}, prompts=PROMPTS), "m3")
    median = served(embedding_model(tmp_path / "median", {"pooling_mode": "median"}), "m4")
    async with serve(ScriptedEngine(lambda asked: []), made, plain, mean, median) as found:
        yield found


async def post(server: Server, **body: Any) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as http, http.post(f"{server.url}/v1/embeddings", json=body) as response:
        return response.status, await response.json()


async def test_embeddings_give_the_official_client_a_vector_for_each_input(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = await client.embeddings.create(model="m1", input=["The dog", "The quick brown fox"])
    assert [entry.index for entry in answer.data] == [0, 1]
    prompts = [asked.request.prompt for asked in server.engine.asked]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, prompts))
    for entry, prompt in zip(answer.data, prompts, strict=True):
        expected = np.array([3.0, 4.0, prompt[0], len(prompt)])
        np.testing.assert_allclose(entry.embedding, expected / np.linalg.norm(expected), rtol=1e-6)
    assert all(asked.request.pooling and asked.request.stop.max_tokens == 0 for asked in server.engine.asked)


@pytest.mark.parametrize("given", [[5, 6, 7], [[5, 6, 7]]])
async def test_embeddings_are_equal_in_both_encodings(server: Server, given: Any) -> None:
    status, floats = await post(server, model="m1", input=given, dimensions=2)
    assert status == 200
    np.testing.assert_allclose(floats["data"][0]["embedding"], [0.6, 0.8], rtol=1e-6)
    _, encoded = await post(server, model="m1", input=given, dimensions=2, encoding_format="base64")
    values = struct.unpack("<2f", base64.b64decode(encoded["data"][0]["embedding"]))
    assert list(values) == floats["data"][0]["embedding"]


async def test_truncation_keeps_the_last_tokens(server: Server) -> None:
    assert (await post(server, model="m1", input=[5, 6, 7, 8], truncate_prompt_tokens=2))[0] == 200
    assert server.engine.asked[-1].request.prompt == (7, 8)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"model": "m2"}, "model", "no 1_Pooling/config.json"),
        ({"model": "m4"}, "model", "its pooling is median"),
        ({"model": "m3", "prompt_name": "passage"}, "prompt_name", "document, query"),
        ({"prompt_name": "query"}, "prompt_name", "its prompts are: none"),
        ({"model": "m3", "prompt_name": "query", "input": [5]}, "prompt_name", "token ids"),
        ({"input": []}, "input", "empty"),
        ({"input": ["a", 1]}, "input", "mixes"),
        ({"input": ""}, "input", "empty"),
        ({"input": ["a", ""]}, "input", "empty"),
        ({"input": [[5], []]}, "input", "empty"),
        ({"input": [5] * 41}, "input", "maximum context length is 40"),
        ({"input": [[5]] * 2049}, "input", "2048"),
        ({"input": [9999]}, "input", "9999"),
        ({"input": "a" * 100_000}, "input", "characters"),
        ({"dimensions": 0}, "dimensions", ">= 1"),
        ({"dimensions": 5}, "dimensions", "<= 4"),
        ({"encoding_format": "int8"}, "encoding_format", "int8"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", ">= 1"),
        ({"priority": 2**40}, "priority", "32 bits"),
    ],
)
async def test_wrong_requests_are_refused_by_the_fields_name(
    server: Server, fields: dict[str, Any], param: str, words: str
) -> None:
    status, answer = await post(server, **{"model": "m1", "input": "a", **fields})
    assert (status, answer["error"]["param"]) == (400, param)
    assert words in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"
    assert (answer["error"]["code"] == "context_length_exceeded") == (
        words in ("characters", "maximum context length is 40")
    )


async def test_embeddings_of_a_prompt_that_fills_the_context(server: Server) -> None:
    status, answer = await post(server, model="m1", input=[[5] * 40, [6]])
    assert (status, answer["usage"]) == (200, {"prompt_tokens": 41, "total_tokens": 41})


@pytest.mark.parametrize(("name", "text"), [("query", "The dog: fox"), ("document", "fox"), (None, "fox")])
async def test_embeddings_put_the_checkpoints_prompt_before_a_text(server: Server, name: str | None, text: str) -> None:
    fields = {} if name is None else {"prompt_name": name}
    assert (await post(server, model="m3", input="fox", **fields))[0] == 200
    asked = server.engine.asked[-1].request
    assert (list(asked.prompt), asked.pooling) == (server.model.text.encode(text), (Pooling.MEAN,))


async def test_embeddings_report_a_vector_that_the_engine_did_not_finish(server: Server) -> None:
    server.engine.finish_with = FinishReason.ABORTED
    assert (await post(server, model="m1", input=["a", "b"]))[0] == 503


@pytest.mark.parametrize(
    ("pooling", "modules", "expected"),
    [
        (LAST, MODULES, Embedding()),
        (LAST, MODULES[:2], Embedding(layers=())),
        (LAST, None, Embedding()),
        ({"pooling_mode": "lasttoken"}, MODULES, Embedding()),
        ({"pooling_mode_cls_token": True}, MODULES, Embedding((Pooling.FIRST,))),
        ({"pooling_mode": "mean", "include_prompt": False}, MODULES, Embedding((Pooling.MEAN,))),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, MODULES, Embedding((Pooling.FIRST, Pooling.MEAN))),
        ({"pooling_mode": "weightedmean"}, MODULES, Embedding((Pooling.WEIGHTED_MEAN,))),
        ({"pooling_mode": ["lasttoken", "max"]}, MODULES, Embedding((Pooling.MAX, Pooling.LAST))),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, MODULES, Embedding((Pooling.MEAN_SQRT_LEN,))),
        ({"pooling_mode": "median"}, MODULES, Embedding(unsupported="its pooling is median, which is not supported")),
        ({}, MODULES, Embedding(unsupported="its pooling is no mode, which is not supported")),
        (LAST, [*MODULES, module("LayerNorm", "3_LayerNorm")], Embedding(unsupported="it has a module of the kind LayerNorm after the pooling")),
        (LAST, [module("Transformer", ""), module("Dense", "1_Dense"), module("Pooling", "1_Pooling")], Embedding(unsupported="its modules are Transformer, Dense, Pooling; they must begin with Transformer, Pooling")),
    ],
)  # fmt: skip
def test_read_embedding_follows_the_files(tmp_path: Path, pooling: Any, modules: Any, expected: Embedding) -> None:
    assert read_embedding(embedding_model(tmp_path / "m", pooling, modules)) == expected


def test_read_embedding_follows_the_prompts(tmp_path: Path) -> None:
    found = read_embedding(embedding_model(tmp_path / "m", prompts=PROMPTS))
    assert found == Embedding(prompts=PROMPTS["prompts"], default_prompt="document")
    left_out = read_embedding(embedding_model(tmp_path / "n", {**LAST, "include_prompt": False}, prompts=PROMPTS))
    assert left_out == Embedding(unsupported="its pooling leaves out the tokens of its prompts")
    with pytest.raises(LoadFailed, match="has no prompt 'x'"):
        read_embedding(embedding_model(tmp_path / "o", prompts={"prompts": {}, "default_prompt_name": "x"}))


def test_read_embedding_names_a_broken_file(tmp_path: Path) -> None:
    folder = embedding_model(tmp_path / "m", modules=[{"type": "a.Pooling", "path": "../other"}])
    with pytest.raises(LoadFailed, match="not in the checkpoint"):
        read_embedding(folder)
    (folder / "modules.json").write_text("[")
    with pytest.raises(LoadFailed, match=r"modules\.json"):
        read_embedding(folder)


def test_shortened_scales_what_is_cut() -> None:
    zero, vector = np.zeros(3, np.float32), np.array([3, 4, 9], np.float32)
    assert shortened(zero, 2).tolist() == [0, 0]
    assert shortened(vector, None).tolist() == [3, 4, 9]
    np.testing.assert_allclose(shortened(vector, 2), [0.6, 0.8])


def dense_model(folder: Path, activation: str, *, bias: bool, order: Sequence[str]) -> tuple[Path, torch.nn.Linear]:
    """An embedding model whose vectors of size 4 go through a Dense module of size 3, and the module."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(4, 3, bias=bias)
    path = embedding_model(
        folder, modules=[*MODULES[:2], *(module(kind, f"{i}_{kind}") for i, kind in enumerate(order, 2))]
    )
    for i, kind in enumerate(order, 2):
        if kind == "Dense":
            (path / f"{i}_Dense").mkdir()
            config = {"in_features": 4, "out_features": 3, "bias": bias, "activation_function": activation}
            (path / f"{i}_Dense" / "config.json").write_text(json.dumps(config))
            save_file(
                {f"linear.{name}": tensor.detach() for name, tensor in linear.state_dict().items()},
                path / f"{i}_Dense" / "model.safetensors",
            )
    return path, linear


@pytest.mark.parametrize(
    "activation", ["activation.Tanh", "linear.Identity", "activation.ReLU", "activation.SiLU", "activation.Sigmoid"]
)
@pytest.mark.parametrize(
    ("bias", "order"), [(True, ("Dense", "Normalize")), (False, ("Normalize", "Dense")), (True, ("Dense",))]
)
async def test_embeddings_go_through_dense_and_normalize_in_the_order_of_the_modules(
    tmp_path: Path, activation: str, bias: bool, order: tuple[str, ...]
) -> None:
    """The reference is sentence-transformers' own forward: nn.Linear with the activation, and functional.normalize."""
    path, linear = dense_model(tmp_path / "m", f"torch.nn.modules.{activation}", bias=bias, order=order)
    activate = getattr(torch.nn, activation.rpartition(".")[2])()
    async with serve(ScriptedEngine(lambda asked: []), served(path, "m1", max_model_len=40)) as server:
        status, answer = await post(server, model="m1", input=[[5, 6], [7]])
        cut = (await post(server, model="m1", input=[5, 6], dimensions=2))[1]["data"][0]["embedding"]
        refused = await post(server, model="m1", input="a", dimensions=4)
    assert status == 200
    vectors = torch.tensor([[3.0, 4.0, 5.0, 2.0], [3.0, 4.0, 7.0, 1.0]])
    with torch.inference_mode():
        for kind in order:
            vectors = activate(linear(vectors)) if kind == "Dense" else functional.normalize(vectors, dim=1)
    found = [entry["embedding"] for entry in answer["data"]]
    np.testing.assert_allclose(found, vectors.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(cut, functional.normalize(vectors[0, :2], dim=0).numpy(), rtol=1e-5, atol=1e-6)
    assert (refused[0], refused[1]["error"]["param"]) == (400, "dimensions")


def test_read_embedding_names_a_dense_module_that_it_cannot_follow(tmp_path: Path) -> None:
    path, _ = dense_model(tmp_path / "m", "torch.nn.modules.activation.GELU", bias=True, order=["Dense"])
    found = read_embedding(path)
    assert found is not None
    assert found.unsupported.startswith("its Dense module has the activation GELU")
    config = json.loads((path / "2_Dense" / "config.json").read_text())
    for wrong, words in (({"out_features": 5}, "shape"), ({"bias": False}, "bias")):
        stated = {**config, "activation_function": "torch.nn.modules.linear.Identity", **wrong}
        (path / "2_Dense" / "config.json").write_text(json.dumps(stated))
        with pytest.raises(LoadFailed, match=words):
            read_embedding(path)
    os.truncate(path / "2_Dense" / "model.safetensors", (256 << 20) + 1)
    with pytest.raises(LoadFailed, match="268435457 bytes; the limit for a Dense module is 268435456 bytes"):
        read_embedding(path)
    (path / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(LoadFailed, match="not pickled"):
        read_embedding(path)


@pytest.mark.parametrize("order", [["Dense"], ["Dense", "Dense"]])
def test_read_embedding_refuses_a_dense_module_for_vectors_of_another_size(tmp_path: Path, order: list[str]) -> None:
    path, _ = dense_model(tmp_path / "m", "torch.nn.modules.activation.Tanh", bias=True, order=order)
    if len(order) == 1:
        two_modes = {**LAST, "pooling_mode_mean_tokens": True, "word_embedding_dimension": 4}
        (path / "1_Pooling" / "config.json").write_text(json.dumps(two_modes))
    with pytest.raises(LoadFailed, match=r"in_features 4, and the vectors before it have [38] values"):
        read_embedding(path)
