"""Response templates as checkpoints have them, and what models write for them."""

from typing import Any

_CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}

HERMES: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": ["<|im_end|>", "<|endoftext|>"]},
    },
}
"""Agrees with the layout of the family that such a checkpoint's chat template shows."""

OWN: dict[str, Any] = {
    "start_anchor_pattern": r"<\|im_start\|>assistant\s",
    "fields": {
        "thinking": {"open": "<|end|>(", "close": ")", "repeats": True, "join": " / "},
        "tool_calls": {
            "open_pattern": r"@(?P<name>\w+)#(?P<id>\d+)\s*",
            "close": ["@@", "@end"],
            "repeats": True,
            "content": "json",
            "transform": {**_CALL, "id": "{id}"},
        },
        "notes": {"open": "%%", "close": "%%"},
        "content": {},
    },
}
"""A format that no family has."""

TAGS: dict[str, Any] = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open_pattern": r"\s*<call (?P<name>\w+)>",
            "close_pattern": r"</call>\s*",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<(?P<key>\w+)>(?P<value>.*?)</\w+>"},
            "transform": _CALL,
        },
        "content": {"content_args": {"strip": False}},
    },
}
LIST: dict[str, Any] = {
    "start_anchor": "[/INST]",
    "fields": {
        "reasoning_content": {"open": "[THINK]", "close": "[/THINK]"},
        "tool_calls": {
            "open": "[TOOL_CALLS]",
            "close": "</s>",
            "content": "json",
            "transform_each": True,
            "transform": {"function": {"name": "{name}", "arguments": "{arguments}"}},
        },
        "content": {"close_pattern": r"</s>|\s*$"},
    },
}
LEADING: dict[str, Any] = {
    "start_anchor": "assistant",
    "fields": {
        "tool_calls": {
            "open_pattern": r'^\s*(?=\{\s*"name")',
            "close": "<|eot|>",
            "content": "json",
            "transform": [{"function": {"name": "{content.name}", "arguments": "{content.parameters}"}}],
        },
        "content": {"close": "<|eot|>"},
    },
}
ALL_TEMPLATES: dict[str, dict[str, Any]] = {
    "hermes": HERMES,
    "own": OWN,
    "tags": TAGS,
    "list": LIST,
    "leading": LEADING,
}
