"""Tokenizes texts for the handlers, in a thread if it would block the event loop."""

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from runtime.interfaces import ServedModel
from runtime.text.tokenizer import Encoding

_THREAD_ABOVE_CHARS = 8192  # about a millisecond
_CALL_COUNTS_CHARS = 64  # the fixed cost of a text, in characters

_T = TypeVar("_T")


async def encode_text(model: ServedModel, text: str, *, add_special_tokens: bool) -> list[int]:
    [found] = await encode_texts(model, [text], add_special_tokens=add_special_tokens)
    return found


async def encode_texts(model: ServedModel, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
    return await _run(texts, lambda: [model.text.encode(text, add_special_tokens=add_special_tokens) for text in texts])


async def encode_last(model: ServedModel, texts: Sequence[str], limit: int) -> list[Encoding]:
    """Encode with special tokens and keep the last tokens of each text, so that the total is at most `limit`; 0 = all.

    It takes several times as long as `encode_texts`.
    """
    return await _run(texts, lambda: [_last(model, text, limit) for text in texts])


def _last(model: ServedModel, text: str, limit: int) -> Encoding:
    found = model.text.encode_with_offsets(text)
    return found.last(limit) if limit else found


async def _run(texts: Sequence[str], work: Callable[[], _T]) -> _T:
    if sum(map(len, texts)) + _CALL_COUNTS_CHARS * len(texts) <= _THREAD_ABOVE_CHARS:
        return work()
    return await asyncio.to_thread(work)
