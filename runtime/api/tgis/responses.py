"""TGIS's response messages, made from deltas and completed sequences.

TGIS (I) and its vLLM adapter (V) differ. Texts of tokens are the vocabulary's pieces. Log-probabilities are of the raw logits (V); the first
input token's is NaN (I). A stream's first and last message carry the seed (I). `stop_sequence` is empty at an EOS (I).
"""

import math
from collections.abc import Sequence

from runtime.api.tgis.params import Planned
from runtime.generation.parts import Completed, Delta
from runtime.ipc.messages import TokenLogprobs
from runtime.text.text_model import TextModel
from runtime.types import FinishReason
from wire.fmaas import generation_pb2 as pb

_REASONS = {
    FinishReason.EOS: pb.EOS_TOKEN,
    FinishReason.STOP_TOKEN: pb.EOS_TOKEN,
    FinishReason.STOP_STRING: pb.STOP_SEQUENCE,
    FinishReason.CONTEXT: pb.TOKEN_LIMIT,
    FinishReason.TIME_LIMIT: pb.TIME_LIMIT,
    FinishReason.ABORTED: pb.CANCELLED,
}


class Answers:
    """Makes the messages of one call."""

    def __init__(self, text: TextModel, options: pb.ResponseOptions) -> None:
        self._text = text
        self._options = options

    def whole(self, planned: Planned, result: Completed, prompt: str) -> pb.GenerationResponse:
        answer = pb.GenerationResponse(
            generated_token_count=len(result.tokens),
            text=(prompt if self._options.input_text else "") + result.text,
            input_token_count=len(planned.request.prompt),
            stop_reason=_reason(result.finish, planned),
            stop_sequence=_stop_sequence(result.stop),
            seed=planned.seed or 0,
        )
        if self._options.input_tokens:
            answer.input_tokens.extend(self._tokens(planned.request.prompt, result.prompt_logprobs))
        if self._options.generated_tokens:
            answer.tokens.extend(self._tokens(result.tokens, result.logprobs))
        return answer

    def first(self, planned: Planned, prompt: str) -> pb.GenerationResponse:
        """Return a stream's first message, with what is known before the first step."""
        return pb.GenerationResponse(
            input_token_count=len(planned.request.prompt),
            text=prompt if self._options.input_text else "",
            seed=planned.seed or 0,
        )

    def inputs(self, planned: Planned, delta: Delta) -> pb.GenerationResponse:
        prompt = planned.request.prompt
        return pb.GenerationResponse(
            input_token_count=len(prompt), input_tokens=self._tokens(prompt, delta.prompt_logprobs)
        )

    def delta(self, planned: Planned, delta: Delta) -> pb.GenerationResponse | None:
        """Return the delta's message, or None if it has nothing to show yet."""
        tokens = self._tokens(delta.tokens, delta.logprobs) if self._options.generated_tokens else []
        text, finish = delta.text, delta.finish
        if finish is None:
            if not text and not tokens:
                return None
            return pb.GenerationResponse(generated_token_count=delta.num_generated, text=text, tokens=tokens)
        return pb.GenerationResponse(
            generated_token_count=delta.num_generated,
            text=text,
            tokens=tokens,
            stop_reason=_reason(finish.reason, planned),
            stop_sequence=_stop_sequence(finish.stop),
            seed=planned.seed or 0,
        )

    def _tokens(self, tokens: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> list[pb.TokenInfo]:
        """Return token messages; `entries` is empty if no details were requested."""
        if not entries:
            return [pb.TokenInfo(text=self._text.piece(token)) for token in tokens]
        return [self._token(token, entry) for token, entry in zip(tokens, entries, strict=True)]

    def _token(self, token: int, entry: TokenLogprobs | None) -> pb.TokenInfo:
        options = self._options
        info = pb.TokenInfo(text=self._text.piece(token))
        if entry is None:
            if options.token_logprobs:
                info.logprob = math.nan
            return info
        if options.token_logprobs:
            info.logprob = entry.logprob
        if options.token_ranks:
            info.rank = max(0, entry.rank)
        for other, logprob in entry.top[: options.top_n_tokens]:
            info.top_tokens.add(text=self._text.piece(other), logprob=logprob if options.token_logprobs else 0.0)
        return info


def _reason(finish: FinishReason, planned: Planned) -> pb.StopReason:
    if finish is FinishReason.LENGTH:
        return pb.TOKEN_LIMIT if planned.server_limited else pb.MAX_TOKENS
    return _REASONS[finish]


def _stop_sequence(stop: str | int | None) -> str:
    return stop if isinstance(stop, str) else ""
