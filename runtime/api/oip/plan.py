"""The planner of the Open Inference Protocol: parameters with OpenAI's names and tokenized prompts to generation requests."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from runtime.api.oip.tensors import INPUT
from runtime.api.openai.params import generation_requests
from runtime.api.openai.types import Shared
from runtime.errors import InvalidRequest
from runtime.generation.limits import draw_seed, output_limit
from runtime.interfaces import ServedModel
from runtime.types import GenerationRequest, LogprobParams
from wire.inference import grpc_predict_v2_pb2 as pb

DEFAULT_MAX_TOKENS = 16
PARAMETERS = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "frequency_penalty", "presence_penalty",
    "min_tokens", "stop", "seed", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "add_special_tokens", "priority",
    "response_format", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "json_schema", "grammar",
)  # fmt: skip


def plan_inference(
    model: ServedModel, body: Shared, prompts: Sequence[Sequence[int]], new_seed: Callable[[], int] = draw_seed
) -> list[GenerationRequest]:
    """Return one request per prompt. Raises InvalidRequest naming the field."""
    default = model.text.sampling.max_tokens or DEFAULT_MAX_TOKENS
    limits = [output_limit(model, prompt, body.max_tokens, default, prompt_param=INPUT) for prompt in prompts]
    return generation_requests(model, body, prompts, limits, LogprobParams(), new_seed)


def message_parameters(given: Mapping[str, pb.InferParameter]) -> dict[str, Any]:
    """Return the values of a gRPC message's parameters. A parameter without a value is None."""
    kinds = {name: parameter.WhichOneof("parameter_choice") for name, parameter in given.items()}
    return {name: getattr(given[name], kind) if kind is not None else None for name, kind in kinds.items()}


def parameters_of(given: Mapping[str, Any]) -> Shared:
    """Return the parameters as a body; `stop` is a list of strings, one string, or a JSON list. Raises InvalidRequest naming the parameter."""
    unknown = next((name for name in given if name not in PARAMETERS), None)
    if unknown is not None:
        raise InvalidRequest(f"parameter {unknown} does not exist; use one of {', '.join(PARAMETERS)}", param=unknown)
    values = dict(given)
    stop = values.get("stop")
    try:
        if isinstance(stop, str) and stop.startswith("["):
            values["stop"] = msgspec.json.decode(stop, type=list[str])
        return msgspec.convert(values, Shared, strict=False)
    except (msgspec.MsgspecError, ValueError) as error:
        raise InvalidRequest(f"a parameter has the wrong type: {error}") from error
