"""Reads a checkpoint's own description of its output, `response_template` of tokenizer_config.json, with transformers' `chat_parsing`.

transformers is imported for checkpoints that have one. Its parser ends at the first malformed call and holds arguments back until a call is
complete. Therefore regions are found by `runtime.generation.regions`, and only their values are made by the library.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LOG = logging.getLogger(__name__)
_REASONING = ("reasoning_content", "thinking", "reasoning")
_CALLS = "tool_calls"
_ANSWER = "content"
_TAGS = "xml-inline"
_SEARCH_S = 0.2  # the longest search of one pattern in a prompt or in a region's text
# What a value's text can raise in the library's parsers and transforms.
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError)


class MalformedRegion(Exception):
    """The text of a region does not have the form that the template requires."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What opens or closes a region. `pattern`: of the module `regex`, which finds partial matches."""

    pattern: Any
    is_literal: bool
    extends: bool  # a literal begins with another one


@dataclass(frozen=True, slots=True)
class Region:
    """A field of the message. `opening` None: the text that is in no other region. `library`: the field as transformers has it."""

    name: str
    opening: Mark | None
    closing: Mark | None
    library: Any

    @property
    def is_answer(self) -> bool:
        return self.name == _ANSWER

    @property
    def is_reasoning(self) -> bool:
        return self.name in _REASONING

    @property
    def is_calls(self) -> bool:
        return self.name == _CALLS

    @property
    def is_stripped(self) -> bool:
        """Whether white space at both ends is left out of the value."""
        return self.library.content != "text" or bool(self.library.content_args.get("strip", True))

    @property
    def join(self) -> str:
        """The text between the values of a region that comes again."""
        return self.library.join or ""

    @property
    def is_plain_json(self) -> bool:
        return bool(self.library.content == "json" and not self.library.content_args)

    @property
    def is_raw_text(self) -> bool:
        """Whether the values of a call's arguments are text, whatever their type."""
        return self.library.content in (_TAGS, "kv-lines")

    @property
    def transform(self) -> Any:
        return self.library.transform

    def without_cut_mark(self, text: str) -> str:
        """Return the text of a region that the end of the output closed, without the beginning of a closing mark."""
        lengths = [
            length
            for literal in self.library.close_literals or ()
            for length in range(1, len(literal))
            if text.endswith(literal[:length])
        ]
        return text[: len(text) - max(lengths, default=0)]

    def value(self, text: str, captures: Mapping[str, str]) -> Any:
        """Return the region's value. Raises MalformedRegion."""
        from transformers.utils.chat_parsing.content_parsers import process_field

        try:
            if self.library.content == _TAGS:
                _check_search_time(self.library.content_args, text)
            return process_field(text, self.library, dict(captures))
        except (TimeoutError, *_MALFORMED) as error:
            raise MalformedRegion(str(error)) from error


@dataclass(frozen=True, slots=True)
class ResponseTemplate:
    """`rest`: the region of text that is in no other one; None = such text is dropped. `text`: the template as it was written."""

    regions: tuple[Region, ...]
    rest: Region | None
    library: Any
    text: str

    @property
    def has_calls(self) -> bool:
        return any(region.is_calls for region in self.regions)

    @property
    def reasoning(self) -> tuple[str, str] | None:
        """The marks around reasoning, if they are single texts."""
        for region in self.regions:
            if region.is_reasoning:
                opens: list[str] = region.library.open_literals or []
                closes: list[str] = region.library.close_literals or []
                return (opens[0], closes[0]) if len(opens) == len(closes) == 1 else None
        return None

    def tail(self, prompt: str) -> str:
        """Return the part of a rendered prompt that belongs to the answer already: what follows the last anchor, or all of it without one."""
        end = 0
        try:
            for found in _search_all(self.library.start_anchor_re, prompt):
                end = found.end()
        except TimeoutError:
            return ""
        return prompt[end:]

    def reads(self, written: str, name: str) -> bool:
        """Whether a text is a call of the function `name`, and nothing else, for this template."""
        from transformers.utils.chat_parsing import parse_response

        try:
            for region in self.regions:
                for mark in (region.opening, region.closing):
                    if mark is not None:
                        _search_all(mark.pattern, written)
            message = parse_response(written, self.library, prefix="")
            calls = message.get(_CALLS)
            call = calls[0] if isinstance(calls, list) and len(calls) == 1 else calls
            return bool(call["function"]["name"] == name) and not message.get(_ANSWER)
        except (TimeoutError, *_MALFORMED):
            return False


def read_response_template(spec: object) -> ResponseTemplate | None:
    """Return the template, or None for a checkpoint without one or, after a warning, with one that this transformers cannot read."""
    if spec is None:
        return None
    try:
        from transformers.utils.chat_parsing.response_templates import load_response_template

        library = load_response_template(spec)
    except (ImportError, *_MALFORMED) as error:
        _LOG.warning("response_template of tokenizer_config.json is not used: %s", error)
        return None
    regions = tuple(map(_region, library.fields.values()))
    rest = next((region for region in regions if region.opening is None), None)
    return ResponseTemplate(regions, rest, library, json.dumps(spec, ensure_ascii=False))


def _search_all(pattern: Any, text: str) -> list[Any]:
    """Return all matches of a pattern of the module `regex`. Raises TimeoutError."""
    return list(pattern.finditer(text, timeout=_SEARCH_S))


def _check_search_time(arguments: Mapping[str, Any], text: str) -> None:
    """Search for the tags of a region as the library does, but with a time limit. Raises TimeoutError, or ValueError for a pattern that is none."""
    import regex  # type: ignore[import-untyped]

    try:
        pattern = regex.compile(arguments.get("tag_pattern", ""), regex.DOTALL)
    except regex.error as error:
        raise ValueError(f"tag_pattern: {error}") from error
    inner = arguments.get("value_parser")
    for found in _search_all(pattern, text):
        if isinstance(inner, dict) and inner.get("name") == _TAGS:
            _check_search_time(inner.get("args", {}), found.groupdict().get("value") or "")


def _region(field: Any) -> Region:
    opening = closing = None
    if field.open_re is not None:
        opening = Mark(field.open_re, field.open_literals is not None, field.open_literal_can_extend)
    if field.close_re is not None:
        closing = Mark(field.close_re, field.close_literals is not None, field.close_literal_can_extend)
    return Region(field.name, opening, closing, field)
