"""Texts to token ids for the handlers, in a thread where it would hold the event loop up. Knows no API's messages."""

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from runtime.interfaces import ServedModel
from runtime.text.tokenizer import Encoding

_THREAD_ABOVE_CHARS = 8192  # about a millisecond
_CALL_COUNTS_CHARS = 64  # what a text costs beside its length

_T = TypeVar("_T")


async def encode_text(model: ServedModel, text: str, *, add_special_tokens: bool) -> list[int]:
    [found] = await encode_texts(model, [text], add_special_tokens=add_special_tokens)
    return found


async def encode_texts(model: ServedModel, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
    return await _beside(
        texts, lambda: [model.text.encode(text, add_special_tokens=add_special_tokens) for text in texts]
    )


async def encode_last(model: ServedModel, texts: Sequence[str], limit: int) -> list[Encoding]:
    """With special tokens, and of each text's own at most as many, from its end, as make `limit` together; 0 = all. Takes several times as long."""
    return await _beside(texts, lambda: [_last(model, text, limit) for text in texts])


def _last(model: ServedModel, text: str, limit: int) -> Encoding:
    found = model.text.encode_with_offsets(text)
    return found.last(limit) if limit else found


async def _beside(texts: Sequence[str], work: Callable[[], _T]) -> _T:
    if sum(map(len, texts)) + _CALL_COUNTS_CHARS * len(texts) <= _THREAD_ABOVE_CHARS:
        return work()
    return await asyncio.to_thread(work)
