"""The planner of ModelInfer: parameters with OpenAI's names and tokenized prompts to generation requests. Pure."""

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
)  # fmt: skip


def plan_inference(
    model: ServedModel, body: Shared, prompts: Sequence[Sequence[int]], new_seed: Callable[[], int] = draw_seed
) -> list[GenerationRequest]:
    """Return one request per prompt. Raises InvalidRequest naming the field."""
    default = model.text.sampling.max_tokens or DEFAULT_MAX_TOKENS
    limits = [output_limit(model, prompt, body.max_tokens, default, prompt_param=INPUT) for prompt in prompts]
    return generation_requests(model, body, prompts, limits, LogprobParams(), new_seed)


def parameters_of(given: Mapping[str, pb.InferParameter]) -> Shared:
    """Return the parameters as a body; `stop` is one string or a JSON list of them. Raises InvalidRequest naming the parameter."""
    values: dict[str, Any] = {}
    for name, parameter in given.items():
        kind = parameter.WhichOneof("parameter_choice")
        if name not in PARAMETERS:
            raise InvalidRequest(f"parameter {name} does not exist; use one of {', '.join(PARAMETERS)}", param=name)
        if kind is not None:
            values[name] = getattr(parameter, kind)
    stop = values.get("stop")
    try:
        if isinstance(stop, str) and stop.startswith("["):
            values["stop"] = msgspec.json.decode(stop, type=list[str])
        return msgspec.convert(values, Shared, strict=False)
    except (msgspec.MsgspecError, ValueError) as error:
        raise InvalidRequest(f"a parameter has the wrong type: {error}") from error
