"""text-generation-inference's HTTP API: through Hugging Face's client, by the rules of the text-generation client, and refusals."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from huggingface_hub import AsyncInferenceClient
from huggingface_hub.errors import OverloadedError, TextGenerationError, ValidationError

from runtime.api.tgi.plan import plan_generate, samples
from runtime.api.tgi.types import GenerateBody, Parameters
from runtime.errors import LoadFailed, Overloaded
from runtime.interfaces import ServedModel
from runtime.types import FinishReason
from tests.support import tokenizers as tiny
from tests.support.grammars import GrammarReader
from tests.support.openai_server import Server, serve
from tests.support.scripted_engine import ScriptedEngine, served

TEXT = "The dog sleeps. END of it"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return served(tiny.byte_level(tmp_path_factory.mktemp("m"), chat_template=tiny.CHATML), "org/m1")


@pytest.fixture
async def server(model: ServedModel) -> AsyncIterator[Server]:
    tokens = model.text.encode(TEXT, add_special_tokens=False)
    async with serve(ScriptedEngine(lambda asked: [*tokens, 0]), model) as found:
        yield found


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
async def hub(server: Server) -> AsyncIterator[AsyncInferenceClient]:
    async with AsyncInferenceClient(model=f"{server.url}/tgi/org/m1", token="none") as found:
        yield found


def events_of(text: str) -> list[Any]:
    return [json.loads(line.removeprefix("data:")) for line in text.splitlines() if line.startswith("data:")]


async def test_hub_client_reads_a_text(hub: AsyncInferenceClient, server: Server) -> None:
    text = await hub.text_generation("A dog", max_new_tokens=50, return_full_text=False)
    assert text == TEXT
    assert await hub.text_generation("A dog", max_new_tokens=50) == "A dog" + TEXT
    assert server.engine.asked[0].request.sampling.greedy


async def test_hub_client_reads_details(hub: AsyncInferenceClient, server: Server) -> None:
    answer = await hub.text_generation(
        "A dog",
        max_new_tokens=50,
        details=True,
        decoder_input_details=True,
        top_n_tokens=2,
        do_sample=True,
        seed=7,
        stop=["END"],
        return_full_text=False,
    )
    details = answer.details
    assert details is not None
    assert answer.generated_text == "The dog sleeps. END"
    assert (details.finish_reason, details.seed) == ("stop_sequence", 7)
    assert "".join(token.text for token in details.tokens) == answer.generated_text
    assert len(details.tokens) == details.generated_tokens
    assert {token.logprob for token in details.tokens} == {-1.5}
    assert [len(top) for top in details.top_tokens or ()] == [2] * details.generated_tokens
    assert [token.id for token in details.prefill] == server.script("A dog")
    assert details.prefill[0].logprob is None


async def test_hub_client_streams_tokens(hub: AsyncInferenceClient, server: Server) -> None:
    stream = await hub.text_generation("A", max_new_tokens=50, stream=True, details=True, return_full_text=True)
    events = [event async for event in stream]
    assert [event.index for event in events] == list(range(1, len(events) + 1))
    shown = [event.token for event in events if not event.token.special]
    assert "".join(token.text for token in shown) == TEXT
    last = events[-1]
    assert (last.token.id, last.token.special, last.generated_text) == (0, True, "A" + TEXT)
    assert last.details is not None
    assert (last.details.finish_reason, last.details.generated_tokens) == ("eos_token", len(events))
    assert (last.details.input_length, last.details.seed) == (len(server.script("A")), None)
    assert {event.generated_text for event in events[:-1]} == {None}


async def test_hub_client_streams_until_a_stop_sequence(hub: AsyncInferenceClient, server: Server) -> None:
    stream = await hub.text_generation("A", max_new_tokens=50, stream=True, details=True, stop=["END"])
    events = [event async for event in stream]
    assert "".join(event.token.text for event in events) == "The dog sleeps. END"
    assert events[-1].details is not None
    assert events[-1].details.finish_reason == "stop_sequence"


async def test_hub_client_raises_by_error_type(hub: AsyncInferenceClient, server: Server) -> None:
    for parameters in ({"temperature": 0.0}, {"top_k": 0}, {"max_new_tokens": 0}, {"max_new_tokens": 999}):
        with pytest.raises(ValidationError, match="Input validation error: "):
            await hub.text_generation("A", **parameters)
    server.engine.raises = Overloaded("its queue is full", model="m1", retry_after_s=2)
    with pytest.raises(OverloadedError, match="queue is full"):
        await hub.text_generation("A", stream=True)
    server.engine.raises, server.engine.fail_after = None, 2
    with pytest.raises(TextGenerationError, match="the engine died"):
        [event async for event in await hub.text_generation("A", stream=True)]


async def test_hub_client_chats_below_the_models_path(server: Server) -> None:
    client = AsyncInferenceClient(base_url=f"{server.url}/tgi/org/m1", api_key="none")
    answer = await client.chat_completion([{"role": "user", "content": "hi"}], model="tgi", max_tokens=50)
    assert answer.choices[0].message.content == TEXT


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"inputs": "A"}),
        ("/generate", {"inputs": "A", "model": "org/m1"}),
        ("/generate", {"inputs": "A", "parameters": {"adapter_id": "org/m1"}}),
        ("/tgi/org/m1/generate", {"inputs": "A", "model": "other"}),
        ("/tgi/org%2Fm1/generate", {"inputs": "A"}),
    ],
)
async def test_generate_finds_the_model(http: aiohttp.ClientSession, server: Server, path: str, body: Any) -> None:
    async with http.post(server.url + path, json=body) as answer:
        assert (answer.status, await answer.json()) == (200, {"generated_text": TEXT})
        assert answer.headers["x-generated-tokens"] == str(len(server.script(TEXT)) + 1)
        assert answer.headers["x-prompt-tokens"] == str(len(server.script("A")))


async def test_root_answers_with_a_list_or_a_stream(http: aiohttp.ClientSession, server: Server) -> None:
    """As the text-generation client asks: it posts to the base URL, and sends every parameter."""
    body = {"inputs": "A", "parameters": {"max_new_tokens": 50, "return_full_text": False, "details": True, "stop": []}}
    async with http.post(server.url, json=body) as answer:
        [found] = await answer.json()
        assert (found["generated_text"], found["details"]["finish_reason"]) == (TEXT, "eos_token")
    async with http.post(server.url, json={**body, "stream": True}) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert events_of(await answer.text())[-1]["generated_text"] == TEXT


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        ({"type": "json", "value": {"type": "object", "required": ["a"]}}, '{"a": 1}', "{}"),
        ({"type": "regex", "value": "a+"}, "aa", "b"),
    ],
)
async def test_grammar_constrains_the_text(
    http: aiohttp.ClientSession, server: Server, tmp_path: Path, grammar: Any, good: str, bad: str
) -> None:
    reader = GrammarReader(tiny.byte_level(tmp_path))
    for path in ("/generate", "/generate_stream"):
        async with http.post(server.url + path, json={"inputs": "A", "parameters": {"grammar": grammar}}) as answer:
            assert answer.status == 200
        wanted = server.engine.asked[-1].request.grammar
        assert wanted is not None
        assert (reader.accepts(wanted, good), reader.accepts(wanted, bad)) == (True, False)


@pytest.mark.parametrize(
    ("parameters", "sampled"),
    [
        (Parameters(), False),
        (Parameters(do_sample=True), True),
        (Parameters(temperature=0.5), True),
        (Parameters(top_p=0.9), True),
        (Parameters(seed=1), False),
        (None, True),
    ],
)
def test_plan_samples_as_tgi_decides(model: ServedModel, parameters: Parameters | None, sampled: bool) -> None:
    request = plan_generate(model, GenerateBody("A", parameters), [5], stream=False, new_seed=lambda: 3)
    assert request.sampling.greedy is not sampled
    if parameters is not None:
        assert samples(parameters) is sampled


async def test_generate_truncates_from_the_left(http: aiohttp.ClientSession, server: Server) -> None:
    body = {"inputs": "the dog " * 400, "parameters": {"truncate": 3, "max_new_tokens": 1}}
    async with http.post(f"{server.url}/generate", json=body) as answer:
        assert answer.status == 200
    assert server.engine.asked[0].request.prompt == tuple(server.script("the dog " * 400)[-3:])


@pytest.mark.parametrize(
    ("body", "status", "kind", "words"),
    [
        ({"inputs": ""}, 422, "validation", "empty"),
        ({"inputs": "the dog " * 400}, 422, "validation", "maximum context length is 200 tokens"),
        ({"inputs": "A", "parameters": {"top_n_tokens": 99}}, 422, "validation", "top_n_tokens must be >= 0 and <= 20"),
        ({"inputs": "A", "parameters": {"stop": [""]}}, 422, "validation", "stop string"),
        ({"inputs": "A", "parameters": {"seed": "x"}}, 422, "validation", "parameters.seed"),
        ({"parameters": {}}, 422, "validation", "inputs"),
        ({"inputs": "A", "model": "nobody"}, 404, "not_found", "loaded: org/m1"),
        ({"inputs": "A", "parameters": {"grammar": {"type": "x"}}}, 422, "validation", "json_schema or regex"),
        ({"inputs": "A", "parameters": {"best_of": 2}}, 501, "unimplemented", "best_of is not supported"),
        ({"inputs": "A", "parameters": {"watermark": True}}, 501, "unimplemented", "watermark"),
    ],
)
async def test_generate_refuses_in_tgis_shape(
    http: aiohttp.ClientSession, server: Server, body: Any, status: int, kind: str, words: str
) -> None:
    for path in ("/generate", "/generate_stream"):
        async with http.post(server.url + path, json=body) as answer:
            found = await answer.json()
            assert (answer.status, found["error_type"]) == (status, kind)
            assert words in found["error"]


async def test_generate_failures_have_tgis_types(http: aiohttp.ClientSession, server: Server) -> None:
    server.engine.raises = LoadFailed("weights are truncated", model="m1")
    async with http.post(f"{server.url}/generate", json={"inputs": "A"}) as answer:
        assert (answer.status, (await answer.json())["error_type"]) == (424, "generation")
    server.engine.raises, server.engine.finish_with = None, FinishReason.ABORTED
    server.engine.script = lambda asked: [5]
    async with http.post(f"{server.url}/generate_stream", json={"inputs": "A"}) as answer:
        assert events_of(await answer.text())[-1]["error_type"] == "unavailable"
    stream = {"inputs": "A", "parameters": {"decoder_input_details": True}}
    async with http.post(f"{server.url}/generate_stream", json=stream) as answer:
        assert (answer.status, "not available in a stream" in await answer.text()) == (422, True)


async def test_info_and_tokenize(http: aiohttp.ClientSession, server: Server) -> None:
    for path in ("/info", "/info?model=org/m1", "/tgi/org/m1/info"):
        async with http.get(server.url + path) as answer:
            info = await answer.json()
        assert (info["model_id"], info["max_total_tokens"], info["max_input_tokens"]) == ("org/m1", 200, 199)
        assert info["model_pipeline_tag"] == "text-generation"
    text = "Grüße"
    async with http.post(f"{server.url}/tgi/org/m1/tokenize", json={"inputs": text}) as answer:
        spans = await answer.json()
    assert [span["id"] for span in spans] == server.script(text)
    assert (spans[0]["start"], spans[-1]["stop"]) == (0, len(text))
    assert all(span["text"] == text[span["start"] : span["stop"]] for span in spans)


async def test_generate_needs_a_name_among_several_models(model: ServedModel) -> None:
    other = ServedModel("m2", "m2", model.settings, model.facts, model.text, 0)
    async with (
        serve(ScriptedEngine(lambda asked: [5]), model, other) as server,
        aiohttp.ClientSession() as http,
        http.post(f"{server.url}/generate", json={"inputs": "A"}) as answer,
    ):
        assert (answer.status, "names the model" in (await answer.json())["error"]) == (422, True)
