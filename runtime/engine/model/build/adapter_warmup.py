"""Compiles the kernels that steps with adapters need, in the thread that loads an adapter, so that no request waits for a compiler."""

import threading

import torch

from runtime.engine.adapters.bank import AdapterBank
from runtime.engine.kernels.activation import Activation
from runtime.engine.kernels.adapters import (
    FEW_TOKENS,
    MAX_MODULES,
    add_adapters,
    add_adapters_gated,
    token_chunks,
    zero_upload,
)
from runtime.engine.kernels.scratch import Scratch

_SIZES = ((1, 1), (16, 16), (FEW_TOKENS, 17), (2 * FEW_TOKENS, 17))  # tokens and chunks of each tiling


class AdapterWarmup:
    """Launches the kernels of adapters once for each shape of a base's layers, on a stream of its own.

    Torch takes streams from a small pool, so a new stream for each load would at some point be the stream on which a graph is captured.
    """

    def __init__(self, device: torch.device, max_tokens: int) -> None:
        self._device = device
        self._max_tokens = max_tokens
        self._stream = torch.cuda.Stream(device)
        self._running = threading.Lock()
        self._done: set[tuple[torch.dtype, Activation | None, int, int]] = set()

    def run(self, bank: AdapterBank) -> None:
        """Launch what no earlier load has launched. Reads and changes nothing."""
        shapes = {(bank.dtype, bank.activation, target.in_features, target.out_features) for target in bank.targets}
        torch.cuda.set_device(self._device)
        with self._running, torch.cuda.stream(self._stream):
            for shape in shapes - self._done:
                self._launch(bank, *shape)
            self._stream.synchronize()
            self._done |= shapes

    @torch.inference_mode()
    def _launch(
        self, bank: AdapterBank, dtype: torch.dtype, activation: Activation | None, in_features: int, out_features: int
    ) -> None:
        device, upload = self._device, zero_upload(self._device)
        scratch = Scratch.allocate(device)
        for num_tokens, num_chunks in _SIZES:
            x = torch.zeros((min(num_tokens, self._max_tokens), in_features), dtype=dtype, device=device)
            chunks = token_chunks(upload, len(x), 0, num_chunks)
            for count in range(1, MAX_MODULES + 1):
                y = torch.zeros((len(x), count * out_features), dtype=dtype, device=device)
                widths = [out_features] * count
                add_adapters(y, x, chunks, bank.table, first_module=0, widths=widths, scratch=scratch)
                if activation is not None and y.shape[1] % 2 == 0 and count < MAX_MODULES:
                    add_adapters_gated(
                        y, x, chunks, bank.table, activation, first_module=0, widths=widths, scratch=scratch
                    )
