"""The planner of text-generation-inference's HTTP API: a request and its tokenized prompt to a generation request."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec

from runtime.api.openai.params import Range, generation_requests
from runtime.api.openai.structured import wanted_of
from runtime.api.openai.types import Shared
from runtime.api.tgi.types import GenerateBody, Parameters
from runtime.errors import InvalidRequest, NotSupported
from runtime.generation.limits import draw_seed, output_limit
from runtime.interfaces import ServedModel
from runtime.text.constraint import Wanted
from runtime.types import GenerationRequest, LogprobParams

MAX_TOP_TOKENS = 20
_POSITIVE = Range(0.0, above_low=True)
_STRICTLY_POSITIVE = ("temperature", "top_k", "max_new_tokens", "truncate")


def check_parameters(model: ServedModel, parameters: Parameters, *, stream: bool) -> None:
    """Raise InvalidRequest or NotSupported naming the parameter. Call it before the prompt is tokenized."""
    for name in _STRICTLY_POSITIVE:
        value = getattr(parameters, name)
        if value is not None:
            _POSITIVE.check(model.name, name, value)
    if parameters.top_n_tokens is not None:
        Range(0, MAX_TOP_TOKENS).check(model.name, "top_n_tokens", parameters.top_n_tokens)
    if stream and parameters.decoder_input_details:
        raise InvalidRequest(
            "decoder_input_details is not available in a stream", model=model.name, param="decoder_input_details"
        )
    for name, asked in (
        ("best_of", (parameters.best_of or 1) != 1),
        ("watermark", parameters.watermark),
        ("adapter_parameters", parameters.adapter_parameters),
    ):
        if asked:
            raise NotSupported(f"{name} is not supported", model=model.name, param=name)


def wanted_grammar(parameters: Parameters) -> Wanted | None:
    """Return what the text must match, or None. Raises InvalidRequest."""
    if not parameters.grammar:
        return None
    match parameters.grammar:
        case {"type": "json" | "json_object" | "json_schema" | "regex", "value": _}:
            wanted = wanted_of(Shared(response_format=parameters.grammar))
        case _:
            raise InvalidRequest("grammar must have a value, and the type json, json_schema or regex", param="grammar")
    return replace(wanted, param="grammar", path="grammar.value") if wanted is not None else None


def plan_generate(
    model: ServedModel,
    body: GenerateBody,
    prompt: Sequence[int],
    *,
    stream: bool,
    new_seed: Callable[[], int] = draw_seed,
) -> GenerationRequest:
    """Return the request for checked parameters. Raises InvalidRequest naming the parameter.

    Without a `max_new_tokens` the answer may fill the context. A stop sequence stays in the text. A stream has one delta per token.
    """
    given = body.parameters or Parameters(do_sample=True)
    limit = output_limit(
        model,
        prompt,
        given.max_new_tokens,
        model.text.sampling.max_tokens,
        param="max_new_tokens",
        prompt_param="inputs",
    )
    [request] = generation_requests(model, _as_shared(given), [prompt], [limit], _logprobs(given, stream), new_seed)
    return msgspec.structs.replace(request, include_stop=True, one_token_deltas=stream)


def samples(parameters: Parameters) -> bool:
    """Whether tokens are drawn. Otherwise the most likely one is chosen."""
    filters = (parameters.temperature, parameters.top_k, parameters.top_p, parameters.typical_p)
    return parameters.do_sample or any(value is not None for value in filters)


def _as_shared(given: Parameters) -> Shared:
    return Shared(
        temperature=given.temperature if samples(given) else 0.0,
        top_k=given.top_k,
        top_p=given.top_p,
        typical_p=given.typical_p,
        repetition_penalty=given.repetition_penalty,
        frequency_penalty=given.frequency_penalty,
        seed=given.seed,
        stop=given.stop,
    )


def _logprobs(given: Parameters, stream: bool) -> LogprobParams:
    """Request the log-probability of each token, for a stream and for the details."""
    detailed = stream or given.details or given.decoder_input_details
    return LogprobParams(
        generated=(given.top_n_tokens or 0) if detailed else None, prompt=0 if given.decoder_input_details else None
    )
