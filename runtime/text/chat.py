"""Turns chats into prompts with the checkpoint's Jinja templates, rendered in a sandbox with the variables that transformers passes."""

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import msgspec

from runtime.errors import InvalidRequest
from runtime.text.call_arguments import as_text, has_calls, wants_text
from runtime.text.call_layout import generic_text
from runtime.text.output_format import OutputFormat, detect_format
from runtime.text.sandbox import Sandbox, render

_CALLS = "tool_calls"
_CONTINUE_MARK = "\u2063continue-here\u2063 "  # ends in a space to see whether the template trims


class ChatMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """One message. `content` is None if it has none, as beside tool calls. Templates may read the fields in `extra`."""

    role: str
    content: str | None
    extra: dict[str, Any] = {}


class ChatOptions(msgspec.Struct, frozen=True):
    """How a chat becomes a prompt. `template` is the name of one of the checkpoint's templates, `variables` are passed to it unchanged.

    `tools` are the functions that the model may call, in OpenAI's form.
    """

    add_generation_prompt: bool = True
    continue_final: bool = False
    template: str | None = None
    variables: dict[str, Any] = {}
    tools: tuple[dict[str, Any], ...] = ()


def thinking_variables(enabled: bool) -> dict[str, Any]:
    """Return the variables that switch the model's reasoning on or off, by the names that families of templates have for it."""
    return {"enable_thinking": enabled, "thinking": enabled}


class ChatTemplates:
    """A checkpoint's templates by name. Each is compiled once."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._texts = dict(templates)
        self._special_tokens = dict(special_tokens)
        self._environment = Sandbox()
        self._compiled: dict[str, jinja2.Template] = {}
        self._arguments_as_text: dict[str, bool] = {}
        self.output_format: OutputFormat | None = detect_format([*self._texts.values()])

    def __bool__(self) -> bool:
        return bool(self._texts)

    def reads(self, model: str, wanted: str | None, variable: str) -> bool:
        """Whether a template names a variable. Raises InvalidRequest like `render`."""
        return variable in self._pick(model, wanted)

    def replaced(self, templates: Mapping[str, str]) -> "ChatTemplates":
        """Return other templates with the same special tokens."""
        return ChatTemplates(templates, self._special_tokens)

    def render(self, model: str, messages: Sequence[ChatMessage], options: ChatOptions) -> str:
        """Return the prompt's text. Raises InvalidRequest if there is no template, or it rejects the chat or fails on it."""
        text = self._pick(model, options.template)
        turns = [_as_template_sees(message, text) for message in messages]
        if options.continue_final:
            if not turns:
                raise InvalidRequest("there is no message to continue", model=model, param="messages")
            turns[-1]["content"] = (turns[-1]["content"] or "") + _CONTINUE_MARK
        if has_calls(turns) and self._wants_text(text):
            turns = as_text(turns)
        try:
            rendered = render(
                self._compile(text),
                {
                    **self._special_tokens,
                    "tools": list(options.tools) or None,
                    "documents": None,
                    **options.variables,
                    "messages": turns,
                    "add_generation_prompt": options.add_generation_prompt and not options.continue_final,
                },
            )
        except jinja2.TemplateError as error:
            raise InvalidRequest(
                f"its chat template rejects this chat: {error.message or error}", model=model, param="messages"
            ) from error
        except (
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            IndexError,
            ArithmeticError,
            RecursionError,
            MemoryError,
        ) as error:
            raise InvalidRequest(
                f"its chat template fails on this chat: {error}", model=model, param="messages"
            ) from error
        return _cut_at_mark(model, rendered) if options.continue_final else rendered

    def _pick(self, model: str, wanted: str | None) -> str:
        if wanted is not None:
            if wanted not in self._texts:
                raise InvalidRequest(
                    f"it has no chat template {wanted!r}, only {sorted(self._texts)}",
                    model=model,
                    param="chat_template",
                )
            return self._texts[wanted]
        if "default" in self._texts:
            return self._texts["default"]
        if not self._texts:
            raise InvalidRequest(
                "it has no chat template: use /v1/completions, or register it with one", model=model, param="messages"
            )
        raise InvalidRequest(
            f"it has no default chat template, only {', '.join(sorted(self._texts))}", model=model, param="messages"
        )

    def _wants_text(self, text: str) -> bool:
        """Whether this template needs the arguments of earlier calls as text."""
        if text not in self._arguments_as_text:
            fixed = {**self._special_tokens, "documents": None, "add_generation_prompt": False}
            self._arguments_as_text[text] = wants_text(lambda chat: render(self._compile(text), {**fixed, **chat}))
        return self._arguments_as_text[text]

    def _compile(self, text: str) -> jinja2.Template:
        template = self._compiled.get(text)
        if template is None:
            template = self._compiled[text] = self._environment.from_string(text)
        return template


def _as_template_sees(message: ChatMessage, template: str) -> dict[str, Any]:
    role = message.role
    if role == "developer" and "developer" not in template:
        role = "system"  # OpenAI's newer name, which most templates do not have
    if _CALLS in template:
        return {**message.extra, "role": role, "content": message.content}
    # The template has no place for calls, and may fail on a message without content.
    extra = {key: value for key, value in message.extra.items() if key != _CALLS}
    calls = message.extra.get(_CALLS)
    texts = [message.content, generic_text(calls) if calls else None]
    return {**extra, "role": role, "content": "\n".join(text for text in texts if text)}


def _cut_at_mark(model: str, rendered: str) -> str:
    mark = _CONTINUE_MARK.strip()
    at = rendered.rfind(mark)
    if at < 0:
        raise InvalidRequest("its chat template cannot continue the last message", model=model, param="messages")
    kept = rendered[:at]
    return kept if rendered.startswith(_CONTINUE_MARK, at) else kept.rstrip()
