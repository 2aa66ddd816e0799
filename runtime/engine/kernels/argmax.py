"""Takes the largest logit of each row that uses greedy sampling and stores it for the next step and the host. Ties go
to the smallest token id.
"""

import torch
from torch import Tensor

from runtime.engine.kernels.inputs import commit_draws_torch
from runtime.engine.kernels.scratch import Scratch
from runtime.engine.kernels.step_inputs import StepInputs


def draw_largest(
    logits: Tensor,
    drawn: Tensor,
    upload: Tensor,
    inputs: StepInputs,
    last_token: Tensor,
    ring: Tensor,
    *,
    num_samples: int,
    scratch: Scratch | None,
) -> None:
    """Write the token id of the largest logit of each row of `logits` [S or more, V] to `drawn` [S] int64.

    Then store the tokens as `commit_draws` in `kernels/inputs.py` does.
    """
    if logits.is_cuda:
        from runtime.engine.kernels.gpu import argmax

        argmax.draw_largest(logits, drawn, upload, inputs, last_token, ring, num_samples, scratch)
    else:
        torch.argmax(logits[:num_samples], 1, out=drawn[:num_samples])
        commit_draws_torch(drawn, upload, inputs, last_token, ring, num_samples)
