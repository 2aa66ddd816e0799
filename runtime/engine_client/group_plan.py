"""Divides the devices of a runtime into groups, each of which one engine owns."""

from collections.abc import Sequence

import msgspec

from common.errors import ConfigError
from runtime.config.schema import EngineConfig


def plan_groups(engine: EngineConfig, sizes: Sequence[int], num_visible: int) -> list[EngineConfig]:
    """Return the configuration of each group's engine, in the order of their devices.

    Without `sizes`, all visible GPUs are divided into groups of `tensor_parallel`. A device with a number stands for one such group, and a CPU too.
    Host memory that is configured is that of all devices together, so each gets a part. `num_visible`: GPUs. Raises ConfigError.
    """
    if sizes and engine.tensor_parallel != 1:
        raise ConfigError(
            f"gpu_groups {_listed(sizes)} and tensor_parallel {engine.tensor_parallel} are both given: gpu_groups alone says all"
        )
    if any(size < 1 for size in sizes):
        raise ConfigError(f"gpu_groups is {_listed(sizes)}: each number must be at least 1")
    kind, _, number = engine.device.partition(":")
    on_gpus = kind != "cpu" and num_visible > 0
    first = int(number or 0)
    if not sizes:
        count = num_visible // engine.tensor_parallel if on_gpus and not number else 1
        sizes = (engine.tensor_parallel,) * max(count, 1)
    if kind != "cpu" and num_visible and first + sum(sizes) > num_visible and len(sizes) > 1:
        raise ConfigError(
            f"gpu_groups {_listed(sizes)} from cuda:{first} on needs {first + sum(sizes)} GPUs, and {num_visible} are visible: give fewer"
        )
    if kind != "cpu" and not num_visible and len(sizes) > 1:
        raise ConfigError(
            f"gpu_groups is {_listed(sizes)} and no GPU is visible: with `device: cpu` they are processes"
        )
    num_devices = sum(sizes)
    planned = []
    for size in sizes:
        planned.append(
            msgspec.structs.replace(
                engine,
                device=f"cuda:{first}" if on_gpus and len(sizes) > 1 else engine.device,
                tensor_parallel=size,
                host_sharers=num_devices,
                host_budget_bytes=engine.host_budget_bytes // num_devices,
                host_kv_bytes=None if engine.host_kv_bytes is None else engine.host_kv_bytes // num_devices,
            )
        )
        first += size
    return planned


def device_names(device: str, size: int, num_before: int, *, is_only: bool) -> tuple[str, ...]:
    """Return the names of a group's devices. `device`: its first one, as the engine names it; `num_before`: devices of the groups before it."""
    kind, _, number = device.partition(":")
    if is_only and size == 1:
        return (device,)
    first = int(number) if number else num_before
    return tuple(f"{kind}:{first + rank}" for rank in range(size))


def _listed(sizes: Sequence[int]) -> str:
    return ",".join(map(str, sizes))
