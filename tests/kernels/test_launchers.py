"""Launchers are built one at a time, and every kernel keeps its own."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

triton = pytest.importorskip("triton")

from runtime.engine.kernels import activation, norm  # noqa: E402 - they need triton
from runtime.engine.kernels.gpu.launchers import one_at_a_time, serialise_launchers  # noqa: E402


def test_launchers_run_one_at_a_time_and_return_each_its_own() -> None:
    building = threading.Semaphore(1)
    shared: list[object] = [None]

    def build(source: object, metadata: object) -> object:
        assert building.acquire(blocking=False), "two launchers were built at once"
        shared[0] = source  # as an extension module of one name: the last load wins
        time.sleep(0.001)
        building.release()
        return shared[0], metadata

    locked = one_at_a_time(build)
    with ThreadPoolExecutor(8) as threads:
        built = list(threads.map(lambda number: locked(number, -number), range(100)))
    assert built == [(number, -number) for number in range(100)]


@pytest.mark.gpu
def test_serialise_launchers_under_many_threads() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    serialise_launchers()

    def check(size: int) -> bool:
        """Each size and kind of norm or activation is another kernel, with another number of arguments."""
        with torch.cuda.stream(torch.cuda.Stream()):
            x = torch.randn(3, 2 * size, device="cuda")
            weight = torch.ones(2 * size, device="cuda")
            wanted = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            same_norm = torch.allclose(norm.rms_norm(x, weight, 1e-6), wanted, atol=1e-4)
            gate, up = x.chunk(2, -1)
            acted = activation.act_mul(x, "silu")
            same_act = torch.allclose(acted, torch.nn.functional.silu(gate) * up, atol=1e-4)
            torch.cuda.current_stream().synchronize()
        return same_norm and same_act

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(check, [64 * number for number in range(1, 65)] * 3))
