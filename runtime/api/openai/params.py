"""Turns OpenAI's request fields into generation requests: ranges, defaults, stops and seeds.

A default comes from the registration, then generation_config.json, then OpenAI's reference. Ranges follow OpenAI's reference, or vLLM's for
vLLM's extensions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from runtime.api.delivery_cost import HTTP_EVENT_S
from runtime.api.openai.types import Shared
from runtime.errors import InvalidRequest
from runtime.generation.limits import check_token_ids, draw_seed, engine_seed, within_float32
from runtime.interfaces import ServedModel
from runtime.types import GenerationRequest, LogprobParams, SamplingParams, StopParams

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_STOP_CHARS = 256
MAX_BIASED_TOKENS = 1024
MAX_STOP_TOKENS = 1024
MAX_BAD_WORDS = 256


@dataclass(frozen=True, slots=True)
class Range:
    """A parameter's range."""

    low: float | None = None
    high: float | None = None
    above_low: bool = False

    def check(self, model: str, param: str, value: float) -> None:
        too_low = self.low is not None and (value <= self.low if self.above_low else value < self.low)
        too_high = self.high is not None and value > self.high
        if too_low or too_high or value != value:
            parts = [f"{'>' if self.above_low else '>='} {self.low:g}"] if self.low is not None else []
            parts += [f"<= {self.high:g}"] if self.high is not None else []
            raise InvalidRequest(
                f"{param} must be {' and '.join(parts)}, got {value:g}", model=model, param=param, value=value
            )


_RANGES = {
    "temperature": Range(0.0, 100.0),
    "top_p": Range(0.0, 1.0, above_low=True),
    "top_k": Range(-1),
    "min_p": Range(0.0, 1.0),
    "typical_p": Range(0.0, 1.0, above_low=True),
    "frequency_penalty": Range(-2.0, 2.0),
    "presence_penalty": Range(-2.0, 2.0),
    "repetition_penalty": Range(0.0, None, above_low=True),
    "n": Range(1, MAX_N),
    "min_tokens": Range(0),
    "truncate_prompt_tokens": Range(1),
    "seed": Range(-(2**63), 2**64 - 1),
    "priority": Range(-(2**31), 2**31 - 1),
}


def _sampling(model: ServedModel, body: Shared) -> SamplingParams:
    """Return the sampling parameters without a seed, which each sequence has of its own."""
    defaults = model.text.sampling
    top_k = _first(body.top_k, defaults.top_k, 0)
    sampling = SamplingParams(
        temperature=_first(body.temperature, defaults.temperature, 1.0),
        top_k=max(0, int(top_k)),
        top_p=_first(body.top_p, defaults.top_p, 1.0),
        min_p=_first(body.min_p, defaults.min_p, 0.0),
        typical_p=_first(body.typical_p, 1.0),
        repetition_penalty=_first(body.repetition_penalty, defaults.repetition_penalty, 1.0),
        frequency_penalty=_first(body.frequency_penalty, 0.0),
        presence_penalty=_first(body.presence_penalty, 0.0),
        logit_bias=_logit_bias(model, body),
        allowed_token_ids=_allowed_token_ids(model, body),
    )
    return within_float32(model, sampling)


def _stop_strings(model: ServedModel, body: Shared) -> tuple[str, ...]:
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    stops = [stop for stop in stops if stop] if isinstance(body.stop, str) else stops
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(
            f"stop takes at most {MAX_STOPS} strings, got {len(stops)}", model=model.name, param="stop"
        )
    for stop in stops:
        if not 0 < len(stop) <= MAX_STOP_CHARS:
            raise InvalidRequest(
                f"a stop string has 1 to {MAX_STOP_CHARS} characters, got one of {len(stop)}",
                model=model.name,
                param="stop",
            )
    return tuple(dict.fromkeys(stops))


def _stop(model: ServedModel, body: Shared, max_tokens: int) -> StopParams:
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens={min_tokens} is above max_tokens={max_tokens}", model=model.name, param="min_tokens"
        )
    token_ids = tuple(dict.fromkeys(body.stop_token_ids or ()))
    if len(token_ids) > MAX_STOP_TOKENS:
        raise InvalidRequest(
            f"stop_token_ids takes at most {MAX_STOP_TOKENS} ids, got {len(token_ids)}",
            model=model.name,
            param="stop_token_ids",
        )
    check_token_ids(model, token_ids, param="stop_token_ids")
    return StopParams(
        max_tokens=max_tokens, min_tokens=min_tokens, stop_token_ids=token_ids, ignore_eos=bool(body.ignore_eos)
    )


def generation_requests(
    model: ServedModel,
    body: Shared,
    prompts: Sequence[Sequence[int]],
    max_tokens: Sequence[int],
    logprobs: LogprobParams,
    new_seed: Callable[[], int] = draw_seed,
) -> list[GenerationRequest]:
    """Return one request for each prompt and each of its `n`, numbered in that order.

    With `seed` in the body, the i-th of a prompt's `n` gets seed + i. Otherwise each gets one from `new_seed`.
    Raises InvalidRequest naming the field. The prompts and `max_tokens` have been checked (`output_limit`).
    """
    for param, allowed in _RANGES.items():
        value = getattr(body, param)
        if value is not None:
            allowed.check(model.name, param, value)
    count = body.n or 1
    sampling = _sampling(model, body)
    stop_strings, bad_words = _stop_strings(model, body), _bad_words(model, body)
    requests: list[GenerationRequest] = []
    for prompt, limit in zip(prompts, max_tokens, strict=True):
        stop, shared = _stop(model, body, limit), tuple(prompt)
        for offset in range(count):
            seed = new_seed() if body.seed is None else engine_seed(body.seed, offset)
            requests.append(
                GenerationRequest(
                    prompt=shared,
                    sampling=sampling if sampling.greedy else msgspec.structs.replace(sampling, seed=seed),
                    stop=stop,
                    logprobs=logprobs,
                    index=len(requests),
                    priority=body.priority or 0,
                    bad_words=bad_words,
                    stop_strings=stop_strings,
                    include_stop=bool(body.include_stop_str_in_output),
                    show_stop_token=bool(body.include_stop_str_in_output),
                    skip_special_tokens=body.skip_special_tokens is not False,
                    event_s=HTTP_EVENT_S,
                )
            )
    return requests


def check_logprobs(model: ServedModel, param: str, value: int | None) -> None:
    if value is not None:
        Range(0, MAX_LOGPROBS).check(model.name, param, value)


def truncated(model: ServedModel, body: Shared, prompt: list[int]) -> list[int]:
    """Return the last `truncate_prompt_tokens` tokens of the prompt, or all if the field is not given. Raises InvalidRequest."""
    if body.truncate_prompt_tokens is None:
        return prompt
    _RANGES["truncate_prompt_tokens"].check(model.name, "truncate_prompt_tokens", body.truncate_prompt_tokens)
    return prompt[-body.truncate_prompt_tokens :]


def _logit_bias(model: ServedModel, body: Shared) -> tuple[tuple[int, float], ...]:
    if not body.logit_bias:
        return ()
    pairs: list[tuple[int, float]] = []
    for text, bias in body.logit_bias.items():
        try:
            token = int(text)
        except ValueError:
            raise InvalidRequest(
                f"logit_bias has the key {text!r}, which is not a token id", model=model.name, param="logit_bias"
            ) from None
        Range(-100.0, 100.0).check(model.name, "logit_bias", bias)
        pairs.append((token, bias))
    if len(pairs) > MAX_BIASED_TOKENS:
        raise InvalidRequest(
            f"logit_bias takes at most {MAX_BIASED_TOKENS} tokens, got {len(pairs)}",
            model=model.name,
            param="logit_bias",
        )
    check_token_ids(model, [token for token, _ in pairs], param="logit_bias")
    return tuple(pairs)


def _allowed_token_ids(model: ServedModel, body: Shared) -> tuple[int, ...]:
    if body.allowed_token_ids is None:
        return ()
    allowed = dict.fromkeys(body.allowed_token_ids)
    check_token_ids(model, tuple(allowed), param="allowed_token_ids")
    # Until min_tokens are drawn the end tokens are suppressed, so another token must remain.
    ends = {*model.facts.eos_token_ids, *(body.stop_token_ids or ())} if body.min_tokens else set()
    if allowed.keys() <= ends:
        wanted = "a token id that does not end the sequence (min_tokens is set)" if allowed else "at least 1 token id"
        raise InvalidRequest(f"allowed_token_ids needs {wanted}", model=model.name, param="allowed_token_ids")
    return tuple(allowed)


def _bad_words(model: ServedModel, body: Shared) -> tuple[tuple[int, ...], ...]:
    """Return the token sequences of each word, as it is written at the start of a text and after a space."""
    words = body.bad_words
    if not words:
        return ()
    if len(words) > MAX_BAD_WORDS:
        raise InvalidRequest(
            f"bad_words takes at most {MAX_BAD_WORDS} words, got {len(words)}", model=model.name, param="bad_words"
        )
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        text = word.lstrip()
        if not 0 < len(text) <= MAX_STOP_CHARS:
            raise InvalidRequest(
                f"a bad word has 1 to {MAX_STOP_CHARS} characters besides spaces, got one of {len(text)}",
                model=model.name,
                param="bad_words",
            )
        for written in (text, f" {text}"):
            found[tuple(model.text.encode(written, add_special_tokens=False))] = None
    banned = tuple(token_ids for token_ids in found if token_ids)
    for token_ids in banned:
        check_token_ids(model, token_ids, param="bad_words")
    if body.allowed_token_ids and {(token,) for token in body.allowed_token_ids} <= set(banned):
        raise InvalidRequest("bad_words exclude every token of allowed_token_ids", model=model.name, param="bad_words")
    return banned


def _first(*values: float | None) -> float:
    """Return the first value that is given. The last one always is."""
    for value in values:
        if value is not None:
            return value
    raise ValueError("no value is given")
