"""Text completions' choices and chunks, with the echoed prompt and its log-probabilities that log-likelihood evaluations need."""

from runtime.api.openai.chunks import encode_text
from runtime.api.openai.completions_plan import Prompt
from runtime.api.openai.responses import (
    CompletionChoice,
    CompletionLogprobs,
    completion_logprobs,
    encode,
    finish_word,
    stop_reason,
)
from runtime.api.openai.types import CompletionBody
from runtime.generation.parts import Completed, Delta, Part, Text
from runtime.interfaces import ServedModel
from runtime.ipc.messages import TokenLogprobs


def completion_choice(model: ServedModel, body: CompletionBody, prompt: Prompt, result: Completed) -> CompletionChoice:
    """Return a sequence as a choice. Raises Unavailable if the runtime ended it."""
    echoed = _echo_text(model, body, prompt) if body.echo else ""
    logprobs: CompletionLogprobs | None = None
    if body.logprobs is not None:
        tokens, entries, offsets = (
            list(result.tokens),
            list[TokenLogprobs | None](result.logprobs),
            list(result.offsets),
        )
        if body.echo:
            tokens = prompt.token_ids + tokens
            entries = list(result.prompt_logprobs) + entries
            offsets = _prompt_offsets(model, body, prompt) + [len(echoed) + offset for offset in offsets]
        logprobs = completion_logprobs(model.text, tokens, entries, offsets)
    return CompletionChoice(
        result.index,
        echoed + result.text,
        finish_word(model, result.finish),
        logprobs,
        stop_reason(result.finish, result.stop),
    )


class CompletionDeltas:
    """Completion chunks. A sequence's first event echoes the prompt, and text offsets count on from there."""

    text_open = b'"text":'
    text_close = b""
    empty = b'"text":""'

    def __init__(self, model: ServedModel, body: CompletionBody, prompts: list[Prompt]) -> None:
        self._body = body
        self._prompts = prompts
        self._per_prompt = body.n or 1
        self._echoes = [_echo_text(model, body, prompt) if body.echo else "" for prompt in prompts]

    def content(self, part: Part) -> bytes:
        if not isinstance(part, Text):
            raise TypeError(f"a completion chunk has no place for {part}")
        return self.text_open + encode_text(part.text)

    def logprobs(self, model: ServedModel, delta: Delta) -> bytes:
        start = len(self._echoes[delta.index // self._per_prompt])
        offsets = [start + offset for offset in delta.offsets]
        return encode(completion_logprobs(model.text, delta.tokens, delta.logprobs, offsets))

    def opening(self, model: ServedModel, delta: Delta) -> bytes:
        if not self._body.echo:
            return b""
        prompt = self._prompts[delta.index // self._per_prompt]
        values = b"null"
        if delta.prompt_logprobs:
            offsets = _prompt_offsets(model, self._body, prompt)
            values = encode(completion_logprobs(model.text, prompt.token_ids, delta.prompt_logprobs, offsets))
        text = encode_text(self._echoes[delta.index // self._per_prompt])
        return b'{"index":%d,"text":' % delta.index + text + b',"logprobs":' + values + b',"finish_reason":null}'


def _echo_text(model: ServedModel, body: CompletionBody, prompt: Prompt) -> str:
    if prompt.text is not None:
        return prompt.text
    return model.text.decode(prompt.token_ids, skip_special_tokens=body.skip_special_tokens is not False)


def _prompt_offsets(model: ServedModel, body: CompletionBody, prompt: Prompt) -> list[int]:
    """Return where each token begins in the echoed text.

    The text has the special tokens and spaces that the client wrote, but not those that the tokenizer added.
    """
    written = prompt.text
    decoder = model.text.detokenizer(
        (), skip_special_tokens=written is not None or body.skip_special_tokens is not False
    )
    offsets: list[int] = []
    length = 0
    for token in prompt.token_ids:
        offsets.append(length)
        text = decoder.push((token,))
        if written is not None:
            if model.text.is_special(token):
                text = model.text.piece(token)
                text = text if written.startswith(text, length) else ""
            elif not written.startswith(text, length):
                text = text.removeprefix(" ")  # sentencepiece adds it before a text and after each special token
        length += len(text)
    return offsets
