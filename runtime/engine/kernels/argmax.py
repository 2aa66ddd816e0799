"""Takes the largest logit of each row that uses greedy sampling and stores it for the next step and the host. Ties go
to the smallest token id. A row with a NaN or without a finite maximum draws NO_TOKEN.
"""

from torch import Tensor

from runtime.engine.interfaces import NO_TOKEN
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
        drawn[:num_samples] = largest(logits[:num_samples])
        commit_draws_torch(drawn, upload, inputs, last_token, ring, num_samples)


def largest(logits: Tensor) -> Tensor:
    """Return the token id of the largest logit of each row of `logits` [S, V] as [S] int64, NO_TOKEN where it is not finite."""
    best, ids = logits.max(1)  # a NaN counts as the largest
    return ids.masked_fill(~best.isfinite(), NO_TOKEN)
