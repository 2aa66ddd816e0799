"""The planners, for any parameters: valid requests within the model's limits, or a refusal that names a field of the request."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.api.oip.plan import PARAMETERS, plan_inference
from runtime.api.openai.chat_plan import plan_chat
from runtime.api.openai.completions_plan import Prompt, plan_completions, separate_prompts
from runtime.api.openai.types import ChatBody, ChatTurn, CompletionBody, Shared
from runtime.api.tgis.params import Prompt as TgisPrompt
from runtime.api.tgis.params import check, plan
from runtime.config.schema import RuntimeConfig
from runtime.errors import InvalidRequest, RepertoryError
from runtime.interfaces import ServedModel
from runtime.types import GenerationRequest
from tests.support import tokenizers as tiny
from tests.support.scripted_engine import served
from wire.fmaas import generation_pb2 as pb

CONTEXT = 40
_counts = st.none() | st.integers(-2, CONTEXT + 5)
_numbers = st.none() | st.floats(allow_infinity=False, width=32) | st.sampled_from([0.0, 1.0, -1.0])
_ids = st.integers(-2, 400)
_common: dict[str, Any] = {
    "max_tokens": _counts,
    "min_tokens": _counts,
    "n": st.none() | st.integers(-1, 4),
    "temperature": _numbers,
    "top_p": _numbers,
    "top_k": _counts,
    "min_p": _numbers,
    "repetition_penalty": _numbers,
    "frequency_penalty": _numbers,
    "seed": st.none() | st.integers(-(2**64), 2**65),
    "stop": st.none() | st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3),
    "stop_token_ids": st.none() | st.lists(_ids, max_size=3),
    "allowed_token_ids": st.none() | st.lists(_ids, max_size=3),
    "logit_bias": st.none() | st.dictionaries(st.sampled_from(["1", "x", "9999"]), st.floats(-120, 120), max_size=2),
    "truncate_prompt_tokens": _counts,
    "priority": st.none() | st.integers(-5, 5),
}


def some_of(fields: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A few fields at a time, so that many requests are valid."""
    return st.sets(st.sampled_from(sorted(fields)), max_size=4).flatmap(
        lambda names: st.fixed_dictionaries({name: fields[name] for name in sorted(names)})
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return served(tiny.byte_level(tmp_path_factory.mktemp("m")), "m1", max_model_len=CONTEXT)


def assert_within_limits(model: ServedModel, requests: list[GenerationRequest]) -> None:
    assert [request.index for request in requests] == list(range(len(requests)))
    for request in requests:
        stop, sampling = request.stop, request.sampling
        assert 1 <= stop.max_tokens <= CONTEXT - len(request.prompt)
        assert 0 <= stop.min_tokens <= stop.max_tokens
        ids = [*request.prompt, *stop.stop_token_ids, *sampling.allowed_token_ids, *dict(sampling.logit_bias)]
        assert all(0 <= token < model.facts.vocab_size for token in ids)
        assert 0 <= sampling.seed < 2**63
        assert 0 < sampling.top_p <= 1
        assert sampling.temperature >= 0
        assert all(request.stop_strings)


def assert_names_a_field(error: RepertoryError, fields: dict[str, Any], prompt_param: str) -> None:
    assert error.param in {*fields, prompt_param}
    assert error.param in error.detail or error.param == prompt_param
    assert error.model == "m1"


@settings(max_examples=300, deadline=None)
@given(
    fields=some_of({**_common, "max_completion_tokens": _counts, "logprobs": st.booleans(), "top_logprobs": _counts}),
    prompt=st.lists(st.integers(0, 250), max_size=CONTEXT + 2),
)
def test_plan_chat_is_within_limits_or_names_a_field(
    model: ServedModel, fields: dict[str, Any], prompt: list[int]
) -> None:
    body = ChatBody(messages=[ChatTurn("user", "hi")], **fields)
    try:
        requests = plan_chat(model, body, prompt, iter(range(100)).__next__)
    except InvalidRequest as error:
        assert_names_a_field(error, fields, "messages")
        return
    assert len(requests) == (body.n or 1)
    assert_within_limits(model, requests)
    kept = prompt if body.truncate_prompt_tokens is None else prompt[-body.truncate_prompt_tokens :]
    assert all(request.prompt == tuple(kept) for request in requests)
    if body.seed is None and not requests[0].sampling.greedy:
        assert [request.sampling.seed for request in requests] == list(range(len(requests)))


@settings(max_examples=300, deadline=None)
@given(
    fields=some_of({**_common, "logprobs": _counts, "echo": st.booleans()}),
    prompts=st.lists(st.lists(st.integers(0, 250), max_size=CONTEXT + 2), min_size=1, max_size=3),
)
def test_plan_completions_is_within_limits_or_names_a_field(
    model: ServedModel, fields: dict[str, Any], prompts: list[list[int]]
) -> None:
    body = CompletionBody(prompt=[list(prompt) for prompt in prompts], **fields)
    try:
        requests = plan_completions(model, body, [Prompt(prompt, None) for prompt in prompts])
    except InvalidRequest as error:
        assert_names_a_field(error, fields, "prompt")
        return
    assert_within_limits(model, requests)
    assert [request.prompt for request in requests] == [tuple(prompt) for prompt in prompts for _ in range(body.n or 1)]
    assert all(
        (request.logprobs.prompt is not None) == bool(body.echo and body.logprobs is not None) for request in requests
    )


@settings(max_examples=200, deadline=None)
@given(
    fields=some_of({name: _common[name] for name in sorted(_common.keys() & set(PARAMETERS))}),
    prompts=st.lists(st.lists(st.integers(0, 250), max_size=CONTEXT + 2), min_size=1, max_size=3),
)
def test_plan_inference_is_within_limits_or_names_a_field(
    model: ServedModel, fields: dict[str, Any], prompts: list[list[int]]
) -> None:
    try:
        requests = plan_inference(model, Shared(**fields), prompts)
    except InvalidRequest as error:
        assert_names_a_field(error, fields, "text_input")
        return
    assert_within_limits(model, requests)
    assert [request.prompt for request in requests] == [tuple(prompt) for prompt in prompts]


@settings(max_examples=200, deadline=None)
@given(
    max_new_tokens=st.integers(0, CONTEXT + 5),
    min_new_tokens=st.integers(0, CONTEXT + 5),
    stops=st.lists(st.text(max_size=3), max_size=7),
    top_p=st.sampled_from([0.0, 0.5, 1.0, 1.5, -1.0]),
    method=st.sampled_from([pb.GREEDY, pb.SAMPLE]),
    prompt=st.lists(st.integers(0, 250), max_size=CONTEXT + 2),
)
def test_plan_tgis_is_within_limits_or_refuses(
    model: ServedModel,
    max_new_tokens: int,
    min_new_tokens: int,
    stops: list[str],
    top_p: float,
    method: Any,
    prompt: list[int],
) -> None:
    params = pb.Parameters(
        method=method,
        sampling=pb.SamplingParameters(top_p=top_p),
        stopping=pb.StoppingCriteria(
            max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens, stop_sequences=stops
        ),
    )
    config = RuntimeConfig(max_new_tokens=CONTEXT)
    try:
        check(params, config.max_new_tokens)
        [planned] = plan(model, config, params, [TgisPrompt("x", tuple(prompt))], None)
    except InvalidRequest:
        return
    assert_within_limits(model, [planned.request])
    assert (planned.seed is None) == (method == pb.GREEDY)


@pytest.mark.parametrize(
    ("prompt", "separate"), [("a", ["a"]), ([1, 2], [[1, 2]]), (["a", "b"], ["a", "b"]), ([[1], [2]], [[1], [2]])]
)
def test_separate_prompts_takes_each_form(prompt: Any, separate: list[Any]) -> None:
    assert separate_prompts(prompt) == separate


@pytest.mark.parametrize("prompt", [[], ["a", 1], ["a", [1]], [[1], 2]])
def test_separate_prompts_refuses_mixed_forms(prompt: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        separate_prompts(prompt)
    assert caught.value.param == "prompt"
