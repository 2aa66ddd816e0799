"""The planner of TGIS's calls: parameter checks, in the adapter's order and with its texts, and generation requests.

Where TGIS (I) and its vLLM adapter (V) differ:
repetition_penalty may have any value above 0 (I), temperature any from 0, and 0 sent explicitly is greedy (V); top_n_tokens is at most 10 (V);
max_new_tokens not given means up to the server's limit, ended by TOKEN_LIMIT (V), unless the model's registration has a max_tokens: then that,
ended by MAX_TOKENS (as I does with 20). A stop sequence's length is counted in UTF-8 bytes (I).
"""

import asyncio
from dataclasses import dataclass

import msgspec

from runtime.api.delivery_cost import GRPC_EVENT_S
from runtime.config.schema import RuntimeConfig
from runtime.errors import ContextExceeded, InvalidRequest, NotSupported
from runtime.generation.limits import check_prompt, draw_seed, engine_seed, within_float32
from runtime.interfaces import ServedModel
from runtime.text.constraint import JSON_OBJECT, Choice, Constraint, GrammarText, JsonSchema, Regex, Wanted, schema_of
from runtime.types import GenerationRequest, Grammar, LogprobParams, SamplingParams, StopParams
from wire.fmaas import generation_pb2 as pb

MAX_STOPS = 6
MAX_STOP_BYTES = 240
MAX_TOP_N = 10
_STOPS_TEXT = (
    f"can specify at most {MAX_STOPS} non-empty stop sequences, each not more than {MAX_STOP_BYTES} UTF8 bytes"
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One input. `token_ids` may be truncated, `text` is not."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Planned:
    """One input's request. Responses carry `seed` (None if greedy). `server_limited`: a length stop is TOKEN_LIMIT."""

    request: GenerationRequest
    seed: int | None
    server_limited: bool


def adapter_of(
    request: pb.BatchedGenerationRequest | pb.SingleGenerationRequest | pb.BatchedTokenizeRequest,
) -> tuple[str, str]:
    """Return the field that names an adapter, and the name; "" if there is none. `prefix_id` is the older field."""
    return ("adapter_id", request.adapter_id) if request.adapter_id else ("prefix_id", request.prefix_id)


def check(params: pb.Parameters, server_limit: int) -> None:
    """Raise InvalidRequest with TGIS's texts, then NotSupported for what is missing."""
    decoding, stopping, sampling, response = params.decoding, params.stopping, params.sampling, params.response
    if params.method not in (pb.GREEDY, pb.SAMPLE):
        raise InvalidRequest(f"decoding method {params.method} does not exist")
    if decoding.HasField("length_penalty") and not 1.0 <= decoding.length_penalty.decay_factor <= 10.0:
        raise InvalidRequest("length_penalty.decay_factor must be >= 1.0 and <= 10.0")
    if decoding.repetition_penalty != 0 and not decoding.repetition_penalty > 0:
        raise InvalidRequest("repetition_penalty must be > 0.0")
    if stopping.max_new_tokens > server_limit:
        raise InvalidRequest(f"max_new_tokens must be <= {server_limit}")
    if stopping.min_new_tokens > (stopping.max_new_tokens or server_limit):
        raise InvalidRequest("min_new_tokens must be <= max_new_tokens")
    stops = stopping.stop_sequences
    if len(stops) > MAX_STOPS or not all(0 < len(stop.encode()) <= MAX_STOP_BYTES for stop in stops):
        raise InvalidRequest(_STOPS_TEXT)
    if response.top_n_tokens > MAX_TOP_N:
        raise InvalidRequest(f"top_n_tokens ({response.top_n_tokens}) must be <= {MAX_TOP_N}")
    if _wants_details(response) and not (response.input_tokens or response.generated_tokens):
        raise InvalidRequest("must request input and/or generated tokens to request extra token detail")
    if sampling.top_p != 0 and not 0 < sampling.top_p <= 1:
        raise InvalidRequest("top_p must be > 0.0 and <= 1.0")
    if not sampling.typical_p <= 1:
        raise InvalidRequest("typical_p must be <= 1.0")
    if sampling.HasField("temperature") and not sampling.temperature >= 0:
        raise InvalidRequest(f"temperature must be >= 0.0, got {sampling.temperature:g}")
    if decoding.HasField("length_penalty"):
        raise NotSupported("decoding.length_penalty is not supported yet")


def plan(
    model: ServedModel,
    config: RuntimeConfig,
    params: pb.Parameters,
    prompts: list[Prompt],
    deadline_s: float | None,
    grammar: Grammar | None = None,
) -> list[Planned]:
    """Check each input's length and return its request. Each input gets a seed of its own if none is given."""
    return [
        _plan_one(model, config, params, prompt, index, deadline_s, grammar) for index, prompt in enumerate(prompts)
    ]


def deadline_of(params: pb.Parameters) -> float | None:
    """Return the deadline in event loop time, counted from now, or None."""
    limit_ms = params.stopping.time_limit_millis
    return asyncio.get_running_loop().time() + limit_ms / 1000 if limit_ms else None


def _plan_one(
    model: ServedModel,
    config: RuntimeConfig,
    params: pb.Parameters,
    prompt: Prompt,
    index: int,
    deadline_s: float | None,
    grammar: Grammar | None,
) -> Planned:
    stopping = params.stopping
    context, num_prompt = model.facts.max_model_len, len(prompt.token_ids)
    try:
        check_prompt(model, prompt.token_ids, param="text")
    except ContextExceeded as error:
        raise InvalidRequest(
            f"input tokens ({error.value}) plus prefix length (0) must be < {error.limit}", param="text"
        ) from error
    if num_prompt + stopping.min_new_tokens > context:
        raise InvalidRequest(
            f"input tokens ({num_prompt}) plus prefix length (0) plus min_new_tokens ({stopping.min_new_tokens}) must be <= {context}"
        )
    wanted = stopping.max_new_tokens or model.settings.sampling.max_tokens
    limit = min(wanted or config.max_new_tokens, config.max_new_tokens, context - num_prompt)
    limit = max(limit, stopping.min_new_tokens)
    sampling = within_float32(model, _sampling(params))
    seed = None
    if not sampling.greedy:
        seed = params.sampling.seed if params.sampling.HasField("seed") else draw_seed()
    include = config.default_include_stop_seqs
    if stopping.HasField("include_stop_sequence"):
        include = stopping.include_stop_sequence
    response = params.response
    details = response.top_n_tokens if _wants_details(response) else None
    request = GenerationRequest(
        prompt=prompt.token_ids,
        sampling=sampling if seed is None else msgspec.structs.replace(sampling, seed=engine_seed(seed)),
        stop=StopParams(max_tokens=limit, min_tokens=stopping.min_new_tokens),
        logprobs=LogprobParams(
            generated=details if response.generated_tokens else None, prompt=details if response.input_tokens else None
        ),
        grammar=grammar,
        index=index,
        stop_strings=tuple(stopping.stop_sequences),
        include_stop=include,
        stops_by_list=True,
        length_before_stop=True,
        skip_special_tokens=not config.output_special_tokens,
        drop_incomplete=True,
        one_token_deltas=response.generated_tokens,
        deadline_s=deadline_s,
        event_s=GRPC_EVENT_S,
    )
    return Planned(request, seed, server_limited=wanted is None or limit < wanted)


def _sampling(params: pb.Parameters) -> SamplingParams:
    penalty = params.decoding.repetition_penalty or 1.0
    given = params.sampling
    if params.method == pb.GREEDY or (given.HasField("temperature") and given.temperature == 0):
        return SamplingParams(temperature=0.0, repetition_penalty=penalty)
    return SamplingParams(
        temperature=given.temperature if given.HasField("temperature") else 1.0,
        top_k=given.top_k,
        top_p=given.top_p or 1.0,
        typical_p=given.typical_p if 0 < given.typical_p < 1 else 1.0,
        repetition_penalty=penalty,
    )


def _wants_details(response: pb.ResponseOptions) -> bool:
    return bool(response.token_logprobs or response.token_ranks or response.top_n_tokens)


def wanted_of(params: pb.Parameters) -> Wanted | None:
    """Return what `decoding.guided` wants, or None. Raises InvalidRequest with TGIS's text for too few choices."""
    decoding = params.decoding
    constraint: Constraint
    match decoding.WhichOneof("guided"):
        case "format" if decoding.format == pb.DecodingParameters.JSON:
            constraint = JSON_OBJECT
        case "json_schema":
            constraint = JsonSchema(schema_of(decoding.json_schema, "decoding.json_schema"))
        case "regex":
            constraint = Regex(decoding.regex)
        case "choice":
            if len(decoding.choice.choices) < 2:
                raise InvalidRequest("Must provide at least two choices")
            constraint = Choice(tuple(decoding.choice.choices))
        case "grammar":
            constraint = GrammarText(decoding.grammar)
        case _:
            return None
    return Wanted(constraint, f"decoding.{decoding.WhichOneof('guided')}")
