"""Describes a loaded model as POST /api/show does: its size, its context and what it can do."""

from runtime.api.ollama.types import Details, ShowAnswer
from runtime.interfaces import ServedModel

_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


def show(model: ServedModel) -> ShowAnswer:
    facts = model.facts
    details = Details(
        format="gguf" if model.root.lower().endswith(".gguf") else "safetensors",
        family=facts.architecture,
        families=[facts.architecture],
        parameter_size=parameter_size(facts.num_parameters),
        quantization_level=facts.quantization.value,
    )
    info: dict[str, str | int] = {
        "general.architecture": facts.architecture,
        "general.parameter_count": facts.num_parameters,
        f"{facts.architecture}.context_length": facts.max_model_len,
        f"{facts.architecture}.vocab_size": facts.vocab_size,
    }
    return ShowAnswer(details, info, _capabilities(model))


def _capabilities(model: ServedModel) -> list[str]:
    """Return Ollama's words: tools and thinking only where the chat template's format is known."""
    found = ["completion"]
    output_format = model.text.output_format
    if output_format is not None and output_format.reads_calls:
        found.append("tools")
    if output_format is not None and output_format.reasoning is not None:
        found.append("thinking")
    return found


def parameter_size(count: int) -> str:
    """Return a count of parameters as Ollama shows it, such as 134.5M."""
    for unit, letter in _UNITS:
        if count >= unit:
            return f"{count / unit:.1f}{letter}"
    return str(count)
