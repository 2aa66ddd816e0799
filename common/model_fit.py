"""Whether a model would fit a runtime and what it needs, defined once from the runtime's answer to the HTTP API and the command line.

`proto/repertory/runtime.proto` carries it under the same names. To add a figure, add a field here and to the proto message.
"""

from collections.abc import Callable

import msgspec

from common.units import size


class ModelFit(msgspec.Struct, frozen=True):
    """A prediction before a model is loaded.

    Sizes are bytes on each of the `num_devices` devices that would share the model, except `stored_bytes`, `nf4_weight_bytes` and `kept_weight_bytes`,
    which are of the whole model: GGUF blocks of the type `unpacked_blocks` take `stored_bytes` in their file, `weight_bytes` once they are loaded,
    `nf4_weight_bytes` if they are quantised to NF4, and `kept_weight_bytes` if they are kept (0 if they cannot be). `evicts` are models that would leave
    device memory, by id in a runtime's answer and by name in that of the HTTP API.
    """

    fits: bool
    reason: str = ""  # why it does not fit
    weight_bytes: int = 0
    kv_bytes_per_token: int = 0
    min_kv_bytes: int = 0  # of one request that fills the context
    workspace_bytes: int = 0  # outside the budget
    capacity_bytes: int = 0
    evicts: tuple[str, ...] = ()
    max_model_len: int = 0  # tokens that a load would have
    wanted_model_len: int = 0  # tokens that were asked for
    quantization: str = ""
    architecture: str = ""
    num_parameters: int = 0
    exact: bool = False  # from the files' own index, not estimated from the configuration
    unpacked_blocks: str = ""
    stored_bytes: int = 0
    nf4_weight_bytes: int = 0
    kept_weight_bytes: int = 0
    num_devices: int = 1


def unpacking_text(name: str, fit: ModelFit, spell: Callable[[str, str], str]) -> str:
    """Return a sentence on what the blocks of a GGUF file take once they are loaded; empty for files of which nothing is unpacked.

    `spell` returns how the caller writes a setting and its value.
    """
    if not fit.unpacked_blocks:
        return ""
    if fit.kept_weight_bytes:
        advice = f"; {spell('gguf_blocks', 'keep')} takes {size(fit.kept_weight_bytes)} and is slower"
    elif fit.nf4_weight_bytes:
        advice = f"; {spell('quantize', 'nf4')} takes {size(fit.nf4_weight_bytes)}"
    else:
        advice = ""
    return (
        f"{name}: {size(fit.stored_bytes)} of {fit.unpacked_blocks} blocks are unpacked to {size(fit.weight_bytes)} when "
        f"the model is loaded{advice}"
    )
