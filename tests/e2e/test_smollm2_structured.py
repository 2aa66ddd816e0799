"""A real model, SmolLM2, through the mesh: required and named calls, schemas and choices are always valid."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest

from tests.support import stack
from tests.support.smollm2 import gguf_path

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 24}, "days": {"type": "integer", "minimum": 1, "maximum": 14}},
    "required": ["city", "days"],
    "additionalProperties": False,
}  # fmt: skip
TIME = {
    "type": "object",
    "properties": {"zone": {"enum": ["UTC", "CET"]}},
    "required": ["zone"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "The weather of a city", "parameters": WEATHER, "strict": True}},
    {"type": "function", "function": {"name": "time", "parameters": TIME}},
]  # fmt: skip
QUESTION: Any = [{"role": "user", "content": "What will the weather be in Paris for the next 3 days?"}]


class City(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=30)
    country: str = pydantic.Field(max_length=30)
    size: Literal["small", "large"]
    rivers: list[str] = pydantic.Field(max_length=1)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    log = tmp_path_factory.mktemp("log") / "serve.log"
    with stack.serve("--device", "cpu", "--memory", "2GiB", log=log) as served:
        stack.load_and_wait(served, "smol", f"file://{gguf_path()}", max_model_len=1024)
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=200) as made:
            yield made


NAMED = {"type": "function", "function": {"name": "time"}}


@pytest.mark.parametrize(
    ("choice", "temperature"),
    [
        ("required", 1.0),
        (NAMED, 0.0),
        pytest.param("required", 0.0, marks=pytest.mark.long),
        pytest.param(NAMED, 1.0, marks=pytest.mark.long),
    ],
)
def test_required_call_is_valid(client: openai.OpenAI, choice: Any, temperature: float) -> None:
    answer = client.chat.completions.create(
        model="smol",
        messages=QUESTION,
        tools=TOOLS,
        tool_choice=choice,
        parallel_tool_calls=False,
        temperature=temperature,
        max_tokens=200,
        n=2,
        seed=7,
    )
    for found in answer.choices:
        calls: Any = found.message.tool_calls
        assert len(calls) == 1
        name, arguments = calls[0].function.name, json.loads(calls[0].function.arguments)
        assert name in (["weather", "time"] if choice == "required" else ["time"])
        jsonschema.validate(arguments, WEATHER if name == "weather" else TIME)
        assert found.finish_reason == ("tool_calls" if choice == "required" else "stop")


def test_structured_answer_is_parsed_by_the_official_client(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="smol",
        messages=[{"role": "user", "content": "Describe Paris as JSON."}],
        response_format=City,
        max_tokens=300,
        temperature=0.7,
        seed=3,
    )
    assert isinstance(answer.choices[0].message.parsed, City)


def test_structured_stream_of_a_choice_and_a_pattern(client: openai.OpenAI) -> None:
    for fields, allowed in (
        ({"guided_choice": ["Paris", "Rome"]}, ("Paris", "Rome")),
        ({"guided_regex": "(19|20)[0-9]{2}"}, None),
    ):
        stream = client.chat.completions.create(
            model="smol", messages=QUESTION, temperature=0, stream=True, extra_body=fields
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        assert text in allowed if allowed else 1900 <= int(text) < 2100
