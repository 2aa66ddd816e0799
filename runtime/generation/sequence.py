"""Turns the engine's rows of one running sequence into deltas of typed parts."""

from collections.abc import Mapping, Sequence

import msgspec

from runtime.generation.parser import OutputParser
from runtime.generation.parts import Delta, Finish, Part
from runtime.ipc.messages import RowTokens, TokenLogprobs
from runtime.text.detokenizer import Detokenizer
from runtime.text.stop_strings import StopScanner
from runtime.types import FinishReason, GenerationRequest

_ENDED_BY_TOKEN = (FinishReason.EOS, FinishReason.STOP_TOKEN)


class RunningSequence:
    """Turns rows into deltas. Push nothing more after a delta with a Finish."""

    __slots__ = (
        "_chars",
        "_detokenizer",
        "_every_token",
        "_held_tokens",
        "_is_plain",
        "_parser",
        "_request",
        "_scanner",
        "_unseen_stops",
        "finish",
        "num_generated",
        "num_reasoning",
    )

    def __init__(
        self,
        request: GenerationRequest,
        detokenizer: Detokenizer,
        parser: OutputParser,
        unseen_stops: Mapping[int, str],
    ) -> None:
        """`unseen_stops`: by id, those of the request's stop strings that are tokens which the detokenizer does not show."""
        self._request = request
        self._detokenizer = detokenizer
        self._parser = parser
        self._unseen_stops = unseen_stops
        self._scanner = (
            StopScanner(request.stop_strings, include=request.include_stop, by_list=request.stops_by_list)
            if request.stop_strings
            else None
        )
        self._every_token = request.one_token_deltas or request.with_details
        self._is_plain = self._scanner is None and not self._every_token
        self._held_tokens: tuple[int, ...] = ()  # tokens whose parts are still held back
        self._chars = 0  # decoded so far, shown or not
        self.num_generated = 0
        self.num_reasoning = 0
        self.finish: Finish | None = None

    @property
    def num_calls(self) -> int:
        """Tool calls that have ended so far."""
        return self._parser.num_calls

    def push(self, row: RowTokens) -> Sequence[Delta]:
        """Return the deltas to send for `row`, and set `finish` with the last one.

        A delta without parts comes only as the sequence's first one, or when every token is requested. Otherwise its tokens go with
        the next delta.
        """
        if self._is_plain and row.finish is None:
            return self._push_plain(row)
        if row.finish is FinishReason.TIME_LIMIT:
            return [self._with_held(self._delta(row, self._rest(), 0, (), Finish(row.finish)))]
        deltas: list[Delta] = []
        for part in split_tokens(row) if self._request.one_token_deltas else (row,):
            is_first = self.num_generated == 0
            delta = self._push(part)
            if not (delta.parts or is_first or self._every_token):
                self._held_tokens += delta.tokens
                continue
            deltas.append(self._with_held(delta) if self._held_tokens else delta)
            if self.finish is not None:
                break
        return deltas

    def _push_plain(self, row: RowTokens) -> Sequence[Delta]:
        """Push a token that is plain text and not the end, as nearly every token is."""
        tokens, before = row.tokens, self.num_generated
        self.num_generated = before + len(tokens)
        text = self._detokenizer.push(tokens)
        parts = self._parser.push(text) if text else ()
        if self._parser.in_reasoning:
            self.num_reasoning += len(tokens)
        if not parts and before:
            self._held_tokens += tokens
            return ()
        if self._held_tokens:
            tokens, self._held_tokens = self._held_tokens + tokens, ()
        details = row.prompt_logprobs or ()
        return (
            Delta(
                self._request.index,
                parts,
                tokens,
                self.num_generated,
                (),
                (),
                details,
                row.cached_tokens,
                self.num_reasoning,
            ),
        )

    def _push(self, row: RowTokens) -> Delta:
        shown = self._num_shown(row)
        texts: list[str] = []
        offsets: list[int] = []
        stop: str | int | None = None
        for position, token in enumerate(row.tokens):
            offsets.append(self._chars)
            text = self._detokenizer.push((token,)) if position < shown else ""
            self._chars += len(text)
            self.num_generated += 1
            if self._scanner is None:
                texts.append(text)
                continue
            match = self._scanner.push(text, check=self._may_stop())
            texts.append(match.text)
            stop = match.stop
            if stop is None and position < shown and token in self._unseen_stops and self._may_stop():
                stop = self._unseen_stops[token]
                texts.append(self._rest() + (stop if self._request.include_stop else ""))
            if stop is not None:
                break
        if stop is not None:
            finish: Finish | None = Finish(FinishReason.STOP_STRING, stop)
        elif row.finish is not None:
            finish = Finish(row.finish, row.stop_token)
            texts.append(self._rest())
        else:
            finish = None
        return self._delta(row, "".join(texts), len(offsets), tuple(offsets), finish)

    def _delta(
        self, row: RowTokens, text: str, num_tokens: int, offsets: tuple[int, ...], finish: Finish | None
    ) -> Delta:
        details = self._request.with_details
        parts = self._parts(text, finish)
        if self._parser.in_reasoning:
            self.num_reasoning += num_tokens
        logprobs: tuple[TokenLogprobs, ...] = row.logprobs[:num_tokens] if details and row.logprobs else ()
        return Delta(
            self._request.index,
            parts,
            row.tokens[:num_tokens],
            self.num_generated,
            logprobs,
            offsets if details else (),
            row.prompt_logprobs or (),
            row.cached_tokens,
            self.num_reasoning,
        )

    def _parts(self, text: str, finish: Finish | None) -> tuple[Part, ...]:
        parts = self._parser.push(text) if text else ()
        if finish is None:
            return parts
        self.finish = finish
        return (*parts, *self._parser.flush(), finish)

    def _with_held(self, delta: Delta) -> Delta:
        held, self._held_tokens = self._held_tokens, ()
        return msgspec.structs.replace(delta, tokens=held + delta.tokens)

    def _num_shown(self, row: RowTokens) -> int:
        """Return how many of the row's tokens have text to show: all but the one that ended the sequence."""
        tokens = row.tokens
        if (
            row.finish in _ENDED_BY_TOKEN
            and tokens
            and tokens[-1] == row.stop_token
            and not self._request.show_stop_token
        ):
            return len(tokens) - 1
        return len(tokens)

    def _may_stop(self) -> bool:
        stop = self._request.stop
        if self.num_generated < stop.min_tokens:
            return False
        return not (self._request.length_before_stop and self.num_generated >= stop.max_tokens)

    def _rest(self) -> str:
        """Return the text that the detokenizer and the stop scanner still hold back."""
        text = "" if self._request.drop_incomplete else self._detokenizer.flush()
        if self._scanner is None:
            return text
        return self._scanner.push(text, check=False).text + self._scanner.flush()


def split_tokens(row: RowTokens) -> list[RowTokens]:
    """Split a row into rows of one token. Fields that come once go with the first, the end goes with the last."""
    if len(row.tokens) <= 1:
        return [row]
    last = len(row.tokens) - 1
    return [
        msgspec.structs.replace(
            row,
            tokens=(token,),
            finish=row.finish if position == last else None,
            stop_token=row.stop_token if position == last else None,
            logprobs=(row.logprobs[position],) if row.logprobs else None,
            prompt_logprobs=row.prompt_logprobs if position == 0 else None,
            cached_tokens=row.cached_tokens if position == 0 else None,
            error_code=row.error_code if position == last else None,
            error=row.error if position == last else None,
            queue_s=row.queue_s if position == 0 else None,
        )
        for position, token in enumerate(row.tokens)
    ]
