"""Packs checkpoints in the test's process, which has torch already. A packer process would import it again."""

import torch

from runtime.puller.pack.packing import pack
from runtime.puller.pack.request import PackRequest
from runtime.puller.progress import PullJob


def pack_here(request: PackRequest, job: PullJob) -> None:
    """Stand in for `runtime.puller.packer.run_packer`."""
    with torch.inference_mode():
        pack(request, lambda event: job.check())
