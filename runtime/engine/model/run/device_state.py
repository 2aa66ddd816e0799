"""Holds what all models of one engine share on the device: row tables, input buffers, the upload ring, the result ring and the graph pool.

It is created once, at the engine's start, and every tensor keeps its address.
"""

from dataclasses import dataclass

import torch

from runtime.config.schema import EngineConfig
from runtime.engine.kernels.scratch import Scratch
from runtime.engine.kernels.step_inputs import StepInputs
from runtime.engine.model.run.adapters import Beside
from runtime.engine.model.run.cuda_graphs import GraphPool
from runtime.engine.model.run.input_buffers import InputRing
from runtime.engine.model.run.result_ring import ResultRing
from runtime.engine.model.run.row_state import RowState


@dataclass(frozen=True, slots=True)
class DeviceState:
    """All work runs on the stream that was current when the state was created.

    Attributes:
        drawn: [max_rows] int64, the tokens drawn in the running step, in the order of the rows that sample.
        beside: where adapters' work runs beside the base's products in a CUDA graph; None on a CPU.
    """

    device: torch.device
    max_rows: int
    max_tokens: int
    rows: RowState
    inputs: StepInputs
    drawn: torch.Tensor
    uploads: InputRing
    results: ResultRing
    graphs: GraphPool
    scratch: Scratch | None
    beside: Beside | None

    @staticmethod
    def create(device: torch.device, config: EngineConfig) -> "DeviceState":
        """Allocate the state. A step may have as many tokens as the token budget, or one per row if that is more."""
        max_tokens = max(config.max_batch_tokens, config.max_rows)
        max_blocks = max_tokens // config.block_tokens + 2 * config.max_rows
        on_gpu = device.type == "cuda"
        return DeviceState(
            device,
            config.max_rows,
            max_tokens,
            RowState(device, config.max_rows),
            StepInputs.allocate(device, max_tokens, config.max_rows),
            torch.zeros(config.max_rows, dtype=torch.int64, device=device),
            InputRing(device, max_tokens, config.max_rows, max_blocks),
            ResultRing(device, config.max_rows),
            GraphPool(device, enabled=on_gpu and config.graphs, collective=config.tensor_parallel > 1),
            Scratch.allocate(device) if on_gpu else None,
            Beside.create(device) if on_gpu else None,
        )
