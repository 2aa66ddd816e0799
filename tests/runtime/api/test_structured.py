"""What each API turns into a grammar, checked by texts that it accepts, and how it refuses what cannot be enforced."""

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.api.openai.structured import wanted_of
from runtime.api.openai.types import Shared
from runtime.api.tgis.params import wanted_of as tgis_wanted
from runtime.errors import InvalidRequest, RepertoryError
from runtime.interfaces import ServedModel
from runtime.text.grammar import answer_grammar
from runtime.types import Grammar, ReasoningBudget
from tests.support import tokenizers as tiny
from tests.support.grammars import GrammarReader
from tests.support.openai_server import Server, serve
from tests.support.scripted_engine import ScriptedEngine, served
from wire.fmaas import generation_pb2 as pb

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
LOOSE = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
THINKING = "<think>{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}:{% if think is defined %}{{ think }}{% endif %}{% endif %}"
CHAT: dict[str, Any] = {"model": "m1", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    path = tiny.byte_level(
        tmp_path_factory.mktemp("m"), chat_template=THINKING, additional_special_tokens=["<think>", "</think>"]
    )
    return served(path, "m1", max_model_len=500)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> GrammarReader:
    return GrammarReader(tiny.byte_level(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
async def server(model: ServedModel) -> AsyncIterator[Server]:
    async with serve(ScriptedEngine(lambda asked: [0]), model) as found:
        yield found


async def post(server: Server, path: str, body: dict[str, Any]) -> tuple[int, Any, str]:
    """Return the status, the body and the `Warning` header."""
    async with aiohttp.ClientSession() as http, http.post(server.url + path, json=body) as response:
        return response.status, await response.json(), response.headers.get("Warning", "")


def asked(server: Server) -> Grammar:
    found = server.engine.asked[-1].request.grammar
    assert found is not None
    return found


OPENAI = [
    ({"response_format": {"type": "json_object"}}, '{"b": 1}', "[]"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, '{"a": 1}', "{}"),
    ({"response_format": {"type": "json_object", "value": SCHEMA}}, '{"a": 1}', "{}"),
    ({"response_format": {"type": "regex", "value": "a+"}}, "aa", "b"),
    ({"structured_outputs": {"json": SCHEMA}}, '{"a": 1}', "{}"),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, '{"a": 1}', "{}"),
    ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}, '{"a":1}', '{"a": 1}'),
    ({"structured_outputs": {"json": SCHEMA, "whitespace_pattern": "_?"}}, '{"a":_1}', '{"a": 1}'),
    (
        {"structured_outputs": {"json": {"type": "object", "properties": {}}, "disable_additional_properties": True}},
        "{}",
        '{"b": 1}',
    ),
    ({"structured_outputs": {"regex": "a+"}}, "aa", "b"),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, "no", "n"),
    ({"structured_outputs": {"grammar": 'root ::= "x" [0-9]'}}, "x1", "x"),
    ({"structured_outputs": {"json_object": True}}, "{}", "[]"),
    ({"guided_json": SCHEMA}, '{"a": 1}', "{}"),
    ({"guided_json": SCHEMA, "guided_whitespace_pattern": ""}, '{"a":1}', '{"a": 1}'),
    ({"guided_regex": "a+", "guided_decoding_backend": "xgrammar"}, "aa", "b"),
    ({"guided_choice": ["yes", "no"]}, "yes", "y"),
    ({"guided_grammar": 'start: "x" | "y"'}, "y", "z"),
    ({"json_schema": SCHEMA}, '{"a": 1}', "{}"),
    ({"grammar": 'root ::= "x"'}, "x", "y"),
]


@pytest.mark.parametrize(("fields", "good", "bad"), OPENAI, ids=[json.dumps(row[0])[:60] for row in OPENAI])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_openai_fields_become_a_grammar(
    server: Server, reader: GrammarReader, path: str, fields: dict[str, Any], good: str, bad: str
) -> None:
    given = {"model": "m1", "prompt": "hello"} if path == "/v1/completions" else CHAT
    status, answer, warning = await post(server, path, {**given, "n": 2, **fields})
    assert (status, warning) == (200, ""), answer
    grammar = asked(server)
    assert [each.request.grammar for each in server.engine.asked] == [grammar, grammar]
    assert (reader.accepts(grammar, good), reader.accepts(grammar, bad)) == (True, False)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "hello", "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}}),
        ("/v1/messages", {**CHAT, "max_tokens": 9, "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}),
        ("/v1/messages", {**CHAT, "max_tokens": 9, "output_format": {"type": "json_schema", "schema": SCHEMA}}),
    ],
)  # fmt: skip
async def test_structured_fields_of_other_chat_protocols_become_a_grammar(
    server: Server, reader: GrammarReader, path: str, body: dict[str, Any]
) -> None:
    status, answer, _ = await post(server, path, {"model": "m1", **body})
    assert status == 200, answer
    assert (reader.accepts(asked(server), '{"a": 1}'), reader.accepts(asked(server), "{}")) == (True, False)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/responses", {"input": "a", "text": {"format": {"type": "json_schema", "schema": LOOSE, "strict": True}}}, "text.format"),
        ("/v1/responses", {"input": "a", "text": {"format": {"type": "json_schema"}}}, "text.format"),
        ("/v1/responses", {"input": "a", "text": {"format": {"type": "xml"}}}, "text.format"),
        ("/v1/messages", {**CHAT, "max_tokens": 9, "output_config": {"format": {"type": "json_schema", "schema": LOOSE}}}, "output_config.format"),
        ("/v1/messages", {**CHAT, "max_tokens": 9, "output_config": {"format": {"type": "json"}}}, "output_config.format"),
    ],
)  # fmt: skip
async def test_structured_fields_of_other_chat_protocols_are_refused_by_name(
    server: Server, path: str, body: dict[str, Any], param: str
) -> None:
    status, answer, _ = await post(server, path, {"model": "m1", **body})
    assert (status, param in answer["error"]["message"]) == (400, True), answer


@pytest.mark.parametrize(
    ("decoding", "good", "bad"),
    [
        (pb.DecodingParameters(format="JSON"), "{}", "1"),
        (pb.DecodingParameters(json_schema=json.dumps(SCHEMA)), '{"a": 1}', "{}"),
        (pb.DecodingParameters(regex=r"\d.\d+"), "1.5", "1"),
        (pb.DecodingParameters(choice=pb.DecodingParameters.StringChoices(choices=["a", "b"])), "b", "c"),
        (pb.DecodingParameters(grammar='root ::= "x"'), "x", "y"),
    ],
)
def test_tgis_decoding_becomes_a_constraint(
    reader: GrammarReader, decoding: pb.DecodingParameters, good: str, bad: str
) -> None:
    wanted = tgis_wanted(pb.Parameters(decoding=decoding))
    assert wanted is not None
    grammar = Grammar(answer_grammar(wanted)[0])
    assert (reader.accepts(grammar, good), reader.accepts(grammar, bad)) == (True, False)


def test_tgis_text_is_no_constraint_and_one_choice_is_refused() -> None:
    assert tgis_wanted(pb.Parameters(decoding=pb.DecodingParameters(format="TEXT"))) is None
    assert tgis_wanted(pb.Parameters()) is None
    one = pb.DecodingParameters(choice=pb.DecodingParameters.StringChoices(choices=["a"]))
    with pytest.raises(InvalidRequest, match="Must provide at least two choices"):
        tgis_wanted(pb.Parameters(decoding=one))


@pytest.mark.parametrize(
    ("fields", "status", "param", "words"),
    [
        ({"structured_outputs": {"json": LOOSE}}, 400, "structured_outputs", 'structured_outputs.json.properties.a: the keyword "uniqueItems"'),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": LOOSE, "strict": True}}}, 400, "response_format", "json_schema.schema.properties.a"),
        ({"guided_json": LOOSE}, 400, "guided_json", "guided_json.properties.a"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, 400, "response_format", "no schema"),
        ({"response_format": {"type": "xml"}}, 400, "response_format", "'xml'"),
        ({"response_format": "json"}, 400, "response_format", "'json'"),
        ({"response_format": {"type": "structural_tag"}}, 501, "response_format", "structural_tag"),
        ({"structured_outputs": {"structural_tag": "{}"}}, 501, "structured_outputs", "structural_tag"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, 400, "structured_outputs", "only use one kind"),
        ({"structured_outputs": {"rules": 1}}, 400, "structured_outputs", "structured_outputs.rules"),
        ({"structured_outputs": 1}, 400, "structured_outputs", "object"),
        ({"structured_outputs": {"choice": []}}, 400, "structured_outputs", "at least 1"),
        ({"structured_outputs": {"regex": 5}}, 400, "structured_outputs", "a string, got int"),
        ({"guided_json": "{"}, 400, "guided_json", "not JSON"),
        ({"guided_regex": "a+", "grammar": "x"}, 400, "grammar", "guided_regex and grammar exclude each other"),
        ({"guided_regex": "("}, 400, "guided_regex", "unclosed group"),
    ],
)  # fmt: skip
async def test_structured_fields_that_cannot_be_enforced_are_refused(
    server: Server, fields: dict[str, Any], status: int, param: str, words: str
) -> None:
    found, answer, _ = await post(server, "/v1/chat/completions", {**CHAT, **fields})
    assert (found, answer["error"]["param"]) == (status, param)
    assert words in answer["error"]["message"]
    assert not server.engine.asked


async def test_structured_schema_that_is_not_strict_is_followed_with_a_warning(server: Server) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": LOOSE, "strict": False}}
    status, _, warning = await post(server, "/v1/chat/completions", {**CHAT, "response_format": form})
    assert status == 200
    assert "response_format.json_schema.schema is not enforced in full: Unimplemented keys uniqueItems" in warning
    assert asked(server).text


@pytest.mark.parametrize(
    ("think", "expected"),
    [
        ("", ("</think>", False, True)),
        ("<think>\n", ("</think>", True, False)),
        ("<think></think>\n\n", ("", False, False)),
    ],
)
async def test_structured_grammar_begins_behind_the_reasoning(
    server: Server, think: str, expected: tuple[str, bool, bool]
) -> None:
    body = {**CHAT, "chat_template_kwargs": {"think": think}, "response_format": {"type": "json_object"}}
    assert (await post(server, "/v1/chat/completions", body))[0] == 200
    grammar = asked(server)
    found = grammar.reasoning_close, grammar.starts_in_reasoning, grammar.reasoning_open_id is not None
    assert found == expected
    assert ("LEADING_SPACE" in grammar.text) == bool(expected[0])


@pytest.mark.parametrize("think", ["", "<think>\n", "<think></think>\n\n"])
async def test_reasoning_budget_reaches_the_engine_or_warns_that_it_has_no_effect(server: Server, think: str) -> None:
    body = {**CHAT, "chat_template_kwargs": {"think": think}, "thinking_token_budget": 64}
    status, _, warning = await post(server, "/v1/chat/completions", body)
    budget = server.engine.asked[-1].request.reasoning_budget
    assert status == 200
    if "</think>" in think:
        assert budget is None
        assert "budget of reasoning has no effect" in warning
        return
    ids = server.model.text.marker_ids(["<think>", "</think>"])
    opened = bool(think)
    assert budget == ReasoningBudget(64, ids["</think>"], None if opened else ids["<think>"], opened)
    assert "budget" not in warning


async def test_reasoning_budget_below_zero_is_refused(server: Server) -> None:
    status, answer, _ = await post(server, "/v1/chat/completions", {**CHAT, "thinking_token_budget": -1})
    assert (status, answer["error"]["param"]) == (400, "thinking_token_budget")


async def test_null_and_text_ask_for_no_grammar(server: Server) -> None:
    nothing: dict[str, Any] = dict.fromkeys(("structured_outputs", "guided_json", "grammar", "json_schema"))
    assert (await post(server, "/v1/chat/completions", {**CHAT, **nothing, "response_format": {"type": "text"}}))[
        0
    ] == 200
    assert server.engine.asked[-1].request.grammar is None


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"response_format": '{"type": "json_object"}'}, "{}"),
        ({"guided_choice": '["a", "b"]'}, "b"),
        ({"json_schema": json.dumps(SCHEMA)}, '{"a": 1}'),
    ],
)
def test_values_may_come_as_text(reader: GrammarReader, fields: dict[str, Any], text: str) -> None:
    wanted = wanted_of(Shared(**fields))
    assert wanted is not None
    assert reader.accepts(Grammar(answer_grammar(wanted)[0]), text)


class City(pydantic.BaseModel):
    name: str
    population: int | None


async def test_structured_answer_is_parsed_by_the_official_client(server: Server, reader: GrammarReader) -> None:
    server.engine.script = lambda asked: [*server.script('{"name": "Paris", "population": 2}'), 0]
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = await client.chat.completions.parse(model="m1", messages=CHAT["messages"], response_format=City)
    assert answer.choices[0].message.parsed == City(name="Paris", population=2)
    assert not reader.accepts(asked(server), '{"name": "Paris"}')


async def test_structured_answer_that_is_cut_raises_in_the_official_client(server: Server) -> None:
    server.engine.script = lambda asked: server.script('{"name": "Paris", "po')
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.LengthFinishReasonError):
            await client.chat.completions.parse(model="m1", messages=CHAT["messages"], response_format=City)


async def test_structured_grammar_error_of_the_engine_has_its_status(server: Server) -> None:
    server.engine.fail_after, server.engine.fail_with = 0, ("INVALID_ARGUMENT", "the grammar cannot be used")
    status, answer, _ = await post(server, "/v1/chat/completions", {**CHAT, "guided_regex": "a", "stream": True})
    assert (status, answer["error"]["message"]) == (400, "model m1: the grammar cannot be used")
    assert answer["error"]["param"] == "guided_regex"


@pytest.mark.parametrize(
    "name", ["response_format", "structured_outputs", "guided_json", "guided_choice", "guided_regex", "grammar"]
)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.sampled_from(["[", "{}"]),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(
                st.sampled_from(["type", "json", "choice", "regex", "json_schema", "value", "schema"]),
                inner,
                max_size=2,
            )
        ),
        max_leaves=4,
    )
)
def test_wanted_of_takes_any_value_or_names_the_field(name: str, value: Any) -> None:
    found: RepertoryError | None = None
    try:
        wanted_of(Shared(**{name: value}))
    except RepertoryError as error:
        found = error
    assert found is None or (found.param or "").startswith(name)


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
async def test_schema_beside_the_type_is_enforced(server: Server, reader: GrammarReader, kind: str) -> None:
    """llama.cpp's form; the schema was dropped, and any object accepted."""
    status, _, _ = await post(
        server, "/v1/chat/completions", {**CHAT, "response_format": {"type": kind, "schema": SCHEMA}}
    )
    assert status == 200
    grammar = server.engine.asked[-1].request.grammar
    assert grammar is not None
    assert reader.accepts(grammar, '{"a":1}')
    assert not reader.accepts(grammar, '{"b":1}')


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", {"model": "m1", "prompt": "hello"})]
)
@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"type": "text", "x": 1}, "response_format.x"),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "y": 1}}, "response_format.json_schema.y"),
        ({"type": "json_object", "schema": None, "z": None}, ""),
    ],
)  # fmt: skip
async def test_unknown_fields_of_a_format_are_named(
    server: Server, path: str, body: dict[str, Any], given: dict[str, Any], named: str
) -> None:
    status, _, warning = await post(server, path, {**body, "response_format": given})
    assert status == 200
    assert (named in warning) if named else not warning
