"""One running sequence: the engine's tokens in, deltas of text out. Pure: knows no engine, no clock and no API."""

from collections.abc import Mapping

import msgspec

from runtime.generation.request import Delta
from runtime.ipc.messages import RowTokens, TokenLogprobs
from runtime.text.detokenizer import Detokenizer
from runtime.text.stop_strings import StopScanner
from runtime.types import FinishReason, GenerationRequest

_ENDED_BY_TOKEN = (FinishReason.EOS, FinishReason.STOP_TOKEN)


class RunningSequence:
    """Turns each RowTokens into a Delta. After a Delta with `finish` nothing more may be pushed."""

    __slots__ = ("_chars", "_detokenizer", "_request", "_scanner", "_unseen_stops", "num_generated")

    def __init__(self, request: GenerationRequest, detokenizer: Detokenizer, unseen_stops: Mapping[int, str]) -> None:
        """`unseen_stops`: those of the request's stop strings, by id, that are tokens which the detokenizer doesn't show."""
        self._request = request
        self._detokenizer = detokenizer
        self._unseen_stops = unseen_stops
        self._scanner = (
            StopScanner(request.stop_strings, include=request.include_stop, by_list=request.stops_by_list)
            if request.stop_strings
            else None
        )
        self._chars = 0  # decoded so far, shown or not
        self.num_generated = 0

    def push(self, row: RowTokens) -> Delta:
        request = self._request
        if self._scanner is None and not request.with_details:
            return self._push_plain(row)
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
                texts.append(self._rest() + (stop if request.include_stop else ""))
            if stop is not None:
                break
        if stop is not None:
            return self._delta(row, "".join(texts), len(offsets), tuple(offsets), FinishReason.STOP_STRING, stop)
        if row.finish is not None:
            texts.append(self._rest())
        return self._delta(row, "".join(texts), len(row.tokens), tuple(offsets), row.finish, row.stop_token)

    def end(self, finish: FinishReason, tokens: tuple[int, ...]) -> Delta:
        """The sequence ends for a reason of the front's own; `tokens` were pushed and not told of yet."""
        return Delta(self._request.index, self._rest(), tokens, self.num_generated, finish)

    def _push_plain(self, row: RowTokens) -> Delta:
        tokens = row.tokens
        self.num_generated += len(tokens)
        if row.finish is None:
            text = self._detokenizer.push(tokens)
        else:
            text = self._detokenizer.push(tokens[: self._num_shown(row)]) + self._rest()
        return Delta(
            self._request.index,
            text,
            tokens,
            self.num_generated,
            row.finish,
            row.stop_token,
            prompt_logprobs=row.prompt_logprobs or (),
            cached_tokens=row.cached_tokens,
        )

    def _delta(
        self,
        row: RowTokens,
        text: str,
        num_tokens: int,
        offsets: tuple[int, ...],
        finish: FinishReason | None,
        stop: str | int | None,
    ) -> Delta:
        wanted = self._request.with_details
        logprobs: tuple[TokenLogprobs, ...] = row.logprobs[:num_tokens] if wanted and row.logprobs else ()
        return Delta(
            self._request.index,
            text,
            row.tokens[:num_tokens],
            self.num_generated,
            finish,
            stop,
            logprobs,
            offsets if wanted else (),
            row.prompt_logprobs or (),
            row.cached_tokens,
        )

    def _num_shown(self, row: RowTokens) -> int:
        """How many of the row's tokens have text to show: all but the one that ended it."""
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
        """Everything that was held back."""
        text = "" if self._request.drop_incomplete else self._detokenizer.flush()
        if self._scanner is None:
            return text
        return self._scanner.push(text, check=False).text + self._scanner.flush()


def split_tokens(row: RowTokens) -> list[RowTokens]:
    """The same row, one token at a time; what comes once goes with the first, the end with the last."""
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
            queue_s=row.queue_s if position == 0 else None,
        )
        for position, token in enumerate(row.tokens)
    ]
