"""Answers and events of text-generation-inference's HTTP API, made from completed sequences and deltas."""

from collections.abc import Sequence

import msgspec

from runtime.api.openai.responses import LOWEST_LOGPROB, encode
from runtime.api.tgi.errors import error_body
from runtime.api.tgi.types import Answer, Details, Event, InputToken, Parameters, StreamDetails, Token
from runtime.errors import RepertoryError, Unavailable
from runtime.generation.parts import Completed, Delta
from runtime.interfaces import ServedModel
from runtime.ipc.messages import TokenLogprobs
from runtime.text.text_model import TextModel
from runtime.types import FinishReason, GenerationRequest

_REASONS = {
    FinishReason.EOS: "eos_token",
    FinishReason.STOP_TOKEN: "eos_token",
    FinishReason.STOP_STRING: "stop_sequence",
    FinishReason.LENGTH: "length",
    FinishReason.CONTEXT: "length",
    FinishReason.TIME_LIMIT: "length",
}


def answer(
    model: ServedModel, parameters: Parameters, request: GenerationRequest, result: Completed, prefix: str
) -> Answer:
    """Return a sequence as an answer. `prefix` is the prompt if it is to be in front. Raises Unavailable if the runtime ended it."""
    reason = _reason(model, result.finish)
    if not (parameters.details or parameters.decoder_input_details):
        return Answer(prefix + result.text)
    ends = [*result.offsets[1:], len(result.text)]
    texts = [result.text[start:end] for start, end in zip(result.offsets, ends, strict=True)]
    tokens = [
        _token(model.text, token, text, entry)
        for token, text, entry in zip(result.tokens, texts, result.logprobs, strict=True)
    ]
    details = Details(
        finish_reason=reason,
        generated_tokens=len(result.tokens),
        seed=_seed(request),
        prefill=_prefill(model.text, request.prompt, result.prompt_logprobs),
        tokens=tokens,
        top_tokens=[_top(model.text, entry) for entry in result.logprobs] if parameters.top_n_tokens else msgspec.UNSET,
    )
    return Answer(prefix + result.text, details)


class TokenEvents:
    """Makes the events of one stream, one for each token."""

    def __init__(self, model: ServedModel, parameters: Parameters, request: GenerationRequest, prefix: str) -> None:
        self.num_events = 0
        self._model = model
        self._parameters = parameters
        self._request = request
        self._pieces = [prefix]

    def delta(self, delta: Delta) -> bytes:
        """Return the delta's event. Raises Unavailable for a sequence that the runtime ended."""
        finish = delta.finish
        reason = _reason(self._model, finish.reason) if finish is not None else ""
        self._pieces.append(delta.text)
        self.num_events += 1
        text = self._model.text
        entry = delta.logprobs[-1] if delta.logprobs else None
        event = Event(
            index=self.num_events,
            token=_token(text, delta.tokens[-1], delta.text, entry)
            if delta.tokens and entry
            else self._no_token(delta),
            top_tokens=_top(text, entry) if entry and self._parameters.top_n_tokens else msgspec.UNSET,
            generated_text="".join(self._pieces) if reason else None,
            details=self._details(reason, delta) if reason and self._parameters.details else None,
        )
        return b"data: " + encode(event) + b"\n\n"

    def end(self) -> bytes:
        return b""

    def error(self, error: RepertoryError) -> bytes:
        return b"data: " + error_body(error) + b"\n\n"

    def _no_token(self, delta: Delta) -> Token:
        """Return the token of a last event that has none of its own: text that was held back until the end."""
        ends = self._model.facts.eos_token_ids
        return Token(ends[0] if ends else 0, delta.text, 0.0, special=not delta.text)

    def _details(self, reason: str, delta: Delta) -> StreamDetails:
        return StreamDetails(reason, delta.num_generated, _seed(self._request), len(self._request.prompt))


def _reason(model: ServedModel, finish: FinishReason) -> str:
    word = _REASONS.get(finish)
    if word is None:
        raise Unavailable("it was unloaded, or the runtime stopped, before the answer was complete", model=model.name)
    return word


def _seed(request: GenerationRequest) -> int | None:
    return None if request.sampling.greedy else request.sampling.seed


def _token(text: TextModel, token: int, shown: str, entry: TokenLogprobs) -> Token:
    """Return a token. A special token, which texts do not show, has its name."""
    special = text.is_special(token)
    return Token(token, text.piece(token) if special else shown, max(entry.logprob, LOWEST_LOGPROB), special)


def _top(text: TextModel, entry: TokenLogprobs) -> list[Token]:
    return [
        Token(token, _bare_text(text, token), max(logprob, LOWEST_LOGPROB), text.is_special(token))
        for token, logprob in entry.top
    ]


def _prefill(text: TextModel, prompt: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> list[InputToken]:
    return (
        [
            InputToken(token, _bare_text(text, token), entry.logprob if entry is not None else None)
            for token, entry in zip(prompt, entries, strict=True)
        ]
        if entries
        else []
    )


def _bare_text(text: TextModel, token: int) -> str:
    """Return a token's text on its own. A part of a character shows as U+FFFD."""
    return text.piece(token) if text.is_special(token) else text.token_bytes(token).decode(errors="replace")
