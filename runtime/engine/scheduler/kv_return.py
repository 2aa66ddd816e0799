"""Decides whether KV that host memory holds is copied back to the device or computed again.

While a model's weights are on their way to the device, a pass computes each layer as soon as the layer's weights have arrived, so computing costs nothing
until it takes longer than the copy of the weights. KV takes its own time on the same link in any case.
"""

from dataclasses import dataclass

from runtime.engine.scheduler.cost_model import CostModel


def restore_is_faster(weights_s: float, copy_s: float, compute_s: float) -> bool:
    """Whether a model computes its next token earlier if KV is copied back.

    Args:
        weights_s: until the last byte of the weights arrives; 0 = all are on the device.
        copy_s: how long the link takes for the KV.
        compute_s: how long the device computes if the KV is not copied back.
    """
    return weights_s + copy_s < max(weights_s, compute_s)


@dataclass(frozen=True, slots=True)
class KvReturn:
    """What returning KV costs one model now.

    Attributes:
        weights_s: until the last byte of the weights arrives.
        copy_s_per_token: how long the link takes for the KV of a token.
        cost: the model's measured step times.
        step_tokens: the most tokens of a step.
    """

    weights_s: float
    copy_s_per_token: float
    cost: CostModel
    step_tokens: int

    def is_faster(self, start: int, end: int, copied: int, queued: int) -> bool:
        """Whether to copy the KV of a row's tokens from `start` to `end` back.

        Args:
            copied: how many of these tokens have their KV in host memory only.
            queued: tokens of other rows that the model computes first.
        """
        compute_s = self.cost.prefill_us(start, end + queued, self.step_tokens) * 1e-6
        return restore_is_faster(self.weights_s, copied * self.copy_s_per_token, compute_s)
