"""Kernels run natively where there is a CUDA device, and in Triton's interpreter on the CPU elsewhere: one process can do only one of the two."""

import warnings
from collections.abc import Iterator

import numpy
import pytest
import torch

pytest.importorskip("triton")


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where tensors of a kernel test lie."""
    native = torch.cuda.is_available()
    if (request.param == "cuda") != native:
        pytest.skip("the other of interpreter and CUDA runs in this process")
    return torch.device("cuda" if native else "cpu")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(20261122)
    # The interpreter computes with numpy, which warns where a GPU gives inf in silence, and makes Python numbers of one-element arrays.
    with numpy.errstate(over="ignore", invalid="ignore", divide="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Conversion of an array with ndim > 0", category=DeprecationWarning)
        yield
