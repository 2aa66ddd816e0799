"""A TokenEngine that plays a script of tokens, and a directory of models over it. Deterministic; records what it was asked."""

import asyncio
import math
import struct
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.model_key import ModelSettings, Quantization
from runtime.errors import ModelNotFound, RepertoryError
from runtime.interfaces import ServedModel
from runtime.ipc.messages import RowTokens, TokenLogprobs
from runtime.text.text_model import load_text
from runtime.types import FinishReason, GenerationRequest, ModelFacts


@dataclass
class Asked:
    """One call of `generate`, and how far it went."""

    model_id: str
    request: GenerationRequest
    sent: int = 0
    closed: bool = False  # the consumer left before the end


Script = Callable[[Asked], Sequence[int]]


@dataclass
class ScriptedEngine:
    """`script` gives the tokens; an EOS id among them ends the sequence unless it is ignored. `step_s` is slept before each."""

    script: Script
    eos: int = 0
    step_s: float = 0.0
    per_row: int = 1
    fail_after: int | None = None
    fail_with: tuple[str, str] = ("UNAVAILABLE", "the engine died")
    raises: RepertoryError | None = None
    finish_with: FinishReason | None = None  # in place of LENGTH when the script ends
    asked: list[Asked] = field(default_factory=list)

    def vector(self, request: GenerationRequest) -> bytes | None:
        """The vector of a request with `pooling`: four values that depend on the prompt. None if the sequence is ended by `finish_with`."""
        if self.finish_with is not None:
            return None
        return struct.pack("<4f", 3.0, 4.0, float(request.prompt[0]), float(len(request.prompt)))

    async def generate(self, model_id: str, request: GenerationRequest) -> AsyncIterator[RowTokens]:
        asked = Asked(model_id, request)
        stop, logprobs = request.stop, request.logprobs
        self.asked.append(asked)
        if self.raises is not None:
            raise self.raises
        ended = False
        try:
            if request.pooling:
                ended = True
                yield RowTokens(1, (), self.finish_with or FinishReason.LENGTH, vector=self.vector(request))
                return
            tokens = list(self.script(asked))[: stop.max_tokens]
            position = 0
            while not ended:
                await asyncio.sleep(self.step_s)
                if self.fail_after is not None and position >= self.fail_after:
                    ended = True
                    yield RowTokens(0, (), FinishReason.ERROR, error_code=self.fail_with[0], error=self.fail_with[1])
                    return
                chunk = tokens[position : position + self.per_row]
                finish, stop_token = None, None
                for index, token in enumerate(chunk):
                    if token in stop.stop_token_ids or (token == self.eos and not stop.ignore_eos):
                        chunk = chunk[: index + 1]
                        finish = FinishReason.STOP_TOKEN if token in stop.stop_token_ids else FinishReason.EOS
                        stop_token = token
                        break
                first = position == 0
                position += len(chunk)
                asked.sent = position
                if finish is None and position >= len(tokens):
                    finish = self.finish_with or FinishReason.LENGTH
                ended = finish is not None
                yield RowTokens(
                    request_id=1,
                    tokens=tuple(chunk),
                    finish=finish,
                    stop_token=stop_token,
                    logprobs=None
                    if logprobs.generated is None
                    else tuple(entry(token, logprobs.generated) for token in chunk),
                    prompt_logprobs=prompt_entries(request.prompt, logprobs.prompt)
                    if first and logprobs.prompt is not None
                    else None,
                    cached_tokens=1 if first else None,
                )
        finally:
            asked.closed = not ended


def entry(token: int, top_n: int) -> TokenLogprobs:
    """The chosen token is always second to `token + 1`."""
    top = tuple(((token + 1 - rank) % 300, -0.5 - rank) for rank in range(top_n))
    return TokenLogprobs(-1.5, 2, top)


def prompt_entries(prompt: Sequence[int], top_n: int) -> tuple[TokenLogprobs | None, ...]:
    return (None, *(entry(token, top_n) for token in prompt[1:]))


def served(
    model_dir: Path, model_id: str = "m1", *, max_model_len: int = 200, settings: ModelSettings | None = None
) -> ServedModel:
    settings = settings or ModelSettings()
    text = load_text(model_dir, settings)
    facts = ModelFacts(
        model_id,
        "TinyForCausalLM",
        "unfused: test",
        "float32",
        Quantization.NONE,
        1000,
        64,
        max_model_len,
        text.vocab_size,
        10,
        (0,),
    )
    return ServedModel(model_id, settings.display_name or model_id, settings, facts, text, math.floor(time.time()))


@dataclass
class Directory:
    models: list[ServedModel]

    def get(self, model_id: str) -> ServedModel:
        for model in self.models:
            if model.model_id == model_id:
                return model
        raise ModelNotFound(f"model {model_id} is not loaded")

    def list(self) -> Sequence[ServedModel]:
        return self.models
