"""Chooses the format of a checkpoint's output: its own response template, or the family that its chat template shows."""

from dataclasses import replace

from runtime.text.call_layout import LAYOUTS, sample_call
from runtime.text.output_format import OWN_FORMAT, OutputFormat
from runtime.text.response_template import ResponseTemplate


def format_of(
    family: OutputFormat | None, template: ResponseTemplate | None, special_tokens: frozenset[str]
) -> OutputFormat | None:
    """Return the format of a checkpoint's output. Its own template wins over the `family` that its chat template shows.

    Grammars write calls in the family's layout as long as the template reads it. `special_tokens`: those in the template's text.
    """
    if template is None or (not template.has_calls and family is not None and family.calls is not None):
        return family
    reasoning = template.reasoning
    layout = None if family is None else LAYOUTS.get(family.name)
    if family is not None and layout is not None and template.reads(sample_call(layout, "f"), "f"):
        tokens = (*family.tokens, *sorted(special_tokens))
        return replace(family, template=template, reasoning=reasoning or family.reasoning, tokens=tokens)
    return OutputFormat(OWN_FORMAT, reasoning=reasoning, tokens=tuple(sorted(special_tokens)), template=template)
