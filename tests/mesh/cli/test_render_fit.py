"""`repertory fit` of a LoRA adapter, which has no KV cache of its own."""

import io

from rich.console import Console

from common.model_fit import ModelFit
from mesh.cli.render import show_fit


def shown(fit: ModelFit) -> list[str]:
    console = Console(file=io.StringIO(), width=100, color_system=None)
    show_fit(console, "sql", fit)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_show_fit_of_an_adapter_names_the_cache_of_its_base() -> None:
    fit = ModelFit(fits=True, architecture="LoRA adapter", num_parameters=3_145_728, weight_bytes=6 << 20, exact=True)
    lines = shown(fit)
    assert "  LoRA adapter  3.1 M parameters" in lines[1]
    assert "  KV cache   that of its base" in lines
    assert lines[-1] == "  fits"
