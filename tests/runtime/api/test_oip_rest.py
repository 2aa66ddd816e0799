"""The Open Inference Protocol's REST API: through Triton's HTTP client, as KServe's client sends it, and refusals."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import aiohttp
import numpy as np
import pytest
import tritonclient.http as triton

from runtime.errors import Overloaded
from runtime.interfaces import ServedModel
from runtime.types import FinishReason
from tests.support import tokenizers as tiny
from tests.support.openai_server import Server, serve
from tests.support.scripted_engine import ScriptedEngine, served

TEXT = "The dog sleeps. END"
T = TypeVar("T")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return served(tiny.byte_level(tmp_path_factory.mktemp("m")), "org/m1")


@pytest.fixture
async def server(model: ServedModel) -> AsyncIterator[Server]:
    tokens = model.text.encode(TEXT, add_special_tokens=False)
    async with serve(ScriptedEngine(lambda asked: [*tokens, 0]), model) as found:
        yield found


async def with_triton(server: Server, work: Callable[[Any], T]) -> T:
    """Run blocking work with Triton's client in a thread, which must also make the client."""

    def run() -> T:
        with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
            return work(client)

    return await asyncio.to_thread(run)


def tensor(*texts: str, binary: bool) -> Any:
    found = triton.InferInput("text_input", [len(texts), 1], "BYTES")
    found.set_data_from_numpy(np.array([[text] for text in texts], dtype=object), binary_data=binary)
    return found


async def test_triton_client_reads_health_and_metadata(server: Server) -> None:
    def work(client: Any) -> None:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("org/m1")
        assert client.is_model_ready("org/m1", "1")
        assert not client.is_model_ready("nobody")
        assert client.get_server_metadata()["name"] == "repertory"
        metadata = client.get_model_metadata("org/m1")
        assert metadata["inputs"] == [{"name": "text_input", "datatype": "BYTES", "shape": [-1]}]
        assert (metadata["name"], metadata["versions"]) == ("org/m1", ["1"])
        assert metadata["properties"]["max_model_len"] == "200"

    await with_triton(server, work)


@pytest.mark.parametrize("binary_in", [False, True])
@pytest.mark.parametrize("binary_out", [None, False, True])
async def test_triton_client_completes_texts(server: Server, binary_in: bool, binary_out: bool | None) -> None:
    outputs = None if binary_out is None else [triton.InferRequestedOutput("text_output", binary_data=binary_out)]

    def work(client: Any) -> None:
        answer = client.infer(
            "org/m1",
            [tensor("The fox", "Grüße", binary=binary_in)],
            request_id="7",
            outputs=outputs,
            parameters={"max_tokens": 50, "temperature": 0.5, "seed": 9, "stop": '["END", "x"]'},
        )
        texts = [text.decode() if isinstance(text, bytes) else text for text in answer.as_numpy("text_output")]
        assert texts == ["The dog sleeps. "] * 2
        assert (answer.get_response()["model_name"], answer.get_response()["id"]) == ("org/m1", "7")

    await with_triton(server, work)
    prompts = [server.model.text.decode(asked.request.prompt) for asked in server.engine.asked]
    assert sorted(prompts) == ["Grüße", "The fox"]
    request = server.engine.asked[0].request
    assert (request.sampling.temperature, request.sampling.seed, request.stop.max_tokens) == (0.5, 9, 50)


async def test_triton_client_raises_on_errors(server: Server) -> None:
    def work(client: Any) -> None:
        for name, version, text in (("nobody", "", "loaded: org/m1"), ("org/m1", "2", "no version 2, only 1")):
            with pytest.raises(triton.InferenceServerException, match=text):
                client.infer(name, [tensor("a", binary=True)], model_version=version)

    await with_triton(server, work)


async def post(server: Server, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with aiohttp.ClientSession() as http, http.post(server.url + path, data=data, headers=headers) as answer:
        raw = await answer.read()
        return answer.status, json.loads(raw) if raw else None, answer.headers


def infer(**changes: Any) -> dict[str, Any]:
    given = {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["The"]}
    return {"inputs": [{**given, **changes}]}


async def test_infer_as_kserve_sends_it(server: Server) -> None:
    """KServe's client has the parameters of a tensor, an id, and flat data; it reads `outputs[].data`."""
    body = {**infer(shape=[2], data=["a", "b"], parameters={}), "id": "x", "parameters": {"stop": ["END"]}}
    status, answer, _ = await post(server, "/v2/models/org/m1/infer", body)
    assert (status, answer["id"], answer["model_version"]) == (200, "x", "1")
    [output] = answer["outputs"]
    assert (output["shape"], output["datatype"]) == ([2], "BYTES")
    assert output["data"] == ["The dog sleeps. "] * 2
    assert (await post(server, "/v2/models/org/m1/infer", infer(shape=[0], data=[])))[1]["outputs"][0]["data"] == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (infer(name="other"), "one tensor text_input, got other"),
        (infer(datatype="FP32"), "must be BYTES, got FP32"),
        (infer(shape=[1, 2]), "shape [n] or [n, 1]"),
        (infer(shape=[2]), "1 elements"),
        (infer(data=[1]), "must be strings, got int"),
        (infer(data=None), "neither data nor"),
        (infer(data=[[["deep"]]]), "must be strings, got list"),
        (infer(parameters={"binary_data_size": 4}), "only one may be used"),
        (infer(data=None, parameters={"binary_data_size": 4}), "0 bytes follow"),
        ({**infer(), "outputs": [{"name": "other"}]}, "output other does not exist"),
        ({**infer(), "parameters": {"max_token": 4}}, "parameter max_token does not exist"),
        ({**infer(), "parameters": {"max_tokens": "many"}}, "wrong type"),
        ({**infer(), "parameters": {"temperature": -1}}, "temperature"),
        ({"inputs": []}, "got none"),
        ({}, "inputs"),
        (b"{", "not JSON"),
    ],
)
async def test_infer_refuses_with_a_text(server: Server, body: Any, words: str) -> None:
    status, answer, _ = await post(server, "/v2/models/org/m1/infer", body)
    assert (status, list(answer)) == (400, ["error"])
    assert words in answer["error"]


@pytest.mark.parametrize(
    ("length", "words"), [("x", "got 'x'"), ("-1", "got '-1'"), ("99", "0 to "), ("3", "not JSON")]
)
async def test_infer_checks_the_length_of_the_json(server: Server, length: str, words: str) -> None:
    headers = {"Inference-Header-Content-Length": length}
    status, answer, _ = await post(server, "/v2/models/org/m1/infer", b'{"inputs": []}', headers)
    assert (status, words in answer["error"]) == (400, True)


async def test_infer_errors_have_their_status_and_headers(server: Server) -> None:
    server.engine.raises = Overloaded("its queue is full", model="m1", retry_after_s=2)
    status, answer, headers = await post(server, "/v2/models/org/m1/infer", infer())
    assert (status, headers["Retry-After"], "queue is full" in answer["error"]) == (429, "2", True)
    status, answer, headers = await post(server, "/v2/models/nobody/infer", infer())
    assert (status, headers["x-repertory-not-here"]) == (404, "1")
    server.engine.raises, server.engine.finish_with = None, FinishReason.ABORTED
    server.engine.script = lambda asked: [5]
    assert (await post(server, "/v2/models/org/m1/infer", infer()))[0] == 503


async def test_generate_answers_with_one_text(server: Server) -> None:
    for body in (
        {"text_input": "The", "parameters": {"max_tokens": 50, "stop": ["END"]}},
        {"text_input": "The", "max_tokens": 50, "stop": "END"},
        {"text_input": "The", "max_tokens": 1, "stop": "END", "parameters": {"max_tokens": 50}},
    ):
        status, answer, _ = await post(server, "/v2/models/org/m1/generate", body)
        wanted = {"model_name": "org/m1", "model_version": "1", "text_output": "The dog sleeps. "}
        assert (status, answer) == (200, wanted)
    status, answer, _ = await post(server, "/v2/models/org/m1/generate", {"text_input": "a", "parameters": {"x": 1}})
    assert (status, "parameter x does not exist" in answer["error"]) == (400, True)


async def test_generate_stream_sends_pieces(server: Server) -> None:
    async def events(**body: Any) -> list[Any]:
        path = f"{server.url}/v2/models/org/m1/versions/1/generate_stream"
        async with aiohttp.ClientSession() as http, http.post(path, json=body) as answer:
            assert answer.headers["Content-Type"].startswith("text/event-stream")
            return [json.loads(line[6:]) async for line in answer.content if line.startswith(b"data: ")]

    found = await events(text_input="The", max_tokens=50)
    assert "".join(event["text_output"] for event in found) == TEXT
    assert len(found) > 3
    server.engine.fail_after = 2
    assert "the engine died" in (await events(text_input="The", max_tokens=50))[-1]["error"]
