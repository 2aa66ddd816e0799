"""OpenAI's parameters to the generator's: ranges, defaults (request, registration or generation_config.json, OpenAI's own), stops and seeds.

Ranges follow OpenAI's reference where it has one, vLLM's for its extensions. Knows no HTTP.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from runtime.api.openai.types import Shared
from runtime.errors import InvalidRequest, NotSupported
from runtime.generation.limits import check_token_ids, draw_seed, engine_seed, within_float32
from runtime.generation.request import HTTP_EVENT_S
from runtime.interfaces import ServedModel
from runtime.types import GenerationRequest, LogprobParams, SamplingParams, StopParams

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_STOP_CHARS = 256
MAX_BIASED_TOKENS = 1024
MAX_STOP_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Range:
    """A parameter's range, and how to say that a value lies outside."""

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


def check_ranges(model: ServedModel, body: Shared) -> None:
    for param, allowed in _RANGES.items():
        value = getattr(body, param)
        if value is not None:
            allowed.check(model.name, param, value)


def sampling_of(model: ServedModel, body: Shared) -> SamplingParams:
    """Without a seed: each sequence gets its own."""
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


def stop_strings_of(model: ServedModel, body: Shared) -> tuple[str, ...]:
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


def stop_of(model: ServedModel, body: Shared, max_tokens: int) -> StopParams:
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


def sequences(
    model: ServedModel,
    body: Shared,
    prompts: Sequence[Sequence[int]],
    max_tokens: Sequence[int],
    logprobs: LogprobParams,
) -> list[GenerationRequest]:
    """One request for each prompt and each of its `n`, numbered in that order. With a seed, the i-th of a prompt's n takes seed + i."""
    count = body.n or 1
    sampling = sampling_of(model, body)
    stops = stop_strings_of(model, body)
    made: list[GenerationRequest] = []
    for prompt, limit in zip(prompts, max_tokens, strict=True):
        stop, shared = stop_of(model, body, limit), tuple(prompt)
        for offset in range(count):
            seed = draw_seed() if body.seed is None else engine_seed(body.seed, offset)
            made.append(
                GenerationRequest(
                    prompt=shared,
                    sampling=sampling if sampling.greedy else msgspec.structs.replace(sampling, seed=seed),
                    stop=stop,
                    logprobs=logprobs,
                    index=len(made),
                    priority=body.priority or 0,
                    stop_strings=stops,
                    include_stop=bool(body.include_stop_str_in_output),
                    show_stop_token=bool(body.include_stop_str_in_output),
                    skip_special_tokens=body.skip_special_tokens is not False,
                    event_s=HTTP_EVENT_S,
                )
            )
    return made


def check_logprobs(model: ServedModel, param: str, value: int | None) -> None:
    if value is not None:
        Range(0, MAX_LOGPROBS).check(model.name, param, value)


def truncated(body: Shared, prompt: list[int]) -> list[int]:
    """Keeps the last tokens, as truncate_prompt_tokens asks."""
    return prompt if body.truncate_prompt_tokens is None else prompt[-body.truncate_prompt_tokens :]


def _logit_bias(model: ServedModel, body: Shared) -> tuple[tuple[int, float], ...]:
    pairs: list[tuple[int, float]] = []
    for text, bias in (body.logit_bias or {}).items():
        try:
            token = int(text)
        except ValueError:
            raise InvalidRequest(
                f"logit_bias has the key {text!r}, which is no token id", model=model.name, param="logit_bias"
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


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def refuse_suffix(suffix: str | None) -> None:
    if suffix:
        raise NotSupported("suffix is not supported yet", param="suffix")
