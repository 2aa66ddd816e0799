"""Compiles the kernels that steps with adapters need, in the thread that loads an adapter, so that no request waits for a compiler."""

import torch

from runtime.engine.adapters.bank import AdapterBank
from runtime.engine.kernels.adapters import FEW_TOKENS, MAX_MODULES, add_adapters, zero_upload

_SIZES = (16, FEW_TOKENS, 2 * FEW_TOKENS)  # a size of each tiling


@torch.inference_mode()
def warm_up_adapters(device: torch.device, bank: AdapterBank, max_tokens: int) -> None:
    """Launch the kernels over uploads without chunks, once for each shape of the base's layers. Reads and changes nothing."""
    torch.cuda.set_device(device)
    shapes = {(target.in_features, target.out_features) for target in bank.targets}
    upload = zero_upload(device)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        for in_features, out_features in shapes:
            for num_tokens in {min(size, max_tokens) for size in _SIZES}:
                x = torch.zeros((num_tokens, in_features), dtype=bank.dtype, device=device)
                for count in range(1, MAX_MODULES + 1):
                    y = torch.zeros((num_tokens, count * out_features), dtype=bank.dtype, device=device)
                    add_adapters(y, x, upload, bank.table, first_module=0, widths=[out_features] * count, num_chunks=1)
        torch.cuda.current_stream(device).synchronize()
