"""Divides the devices of a runtime into groups, each of which one engine owns."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from common.errors import ConfigError
from runtime.config.schema import EngineConfig

_LARGEST_GROUP = 64


@dataclass(frozen=True, slots=True)
class SharedGroup:
    """A group of devices that are groups of their own as well. Its engine starts when a model needs it.

    `first`: the number of its first device among the runtime's. `overhead_bytes`: memory that its process takes on each device besides its slabs.
    """

    config: EngineConfig
    first: int
    overhead_bytes: int = 0


def parse_groups(text: str) -> tuple[tuple[int, ...], ...]:
    """Parse sizes such as "1,1+2": the groups that start at once, and after each + further groups of the same devices. Raises ConfigError."""
    layers = tuple(tuple(int(size) for size in layer.split(",")) for layer in text.split("+")) if text else ()
    if any(not 1 <= size <= _LARGEST_GROUP for layer in layers for size in layer):
        raise ConfigError(f"gpu_groups is {text}: each number must be between 1 and {_LARGEST_GROUP}")
    return layers


def plan_shared_groups(homes: Sequence[EngineConfig], layers: Sequence[Sequence[int]]) -> list[SharedGroup]:
    """Return the shared groups of the devices of `homes`, which `plan_groups` made.

    Without `layers`, GPUs that are groups of one form groups of 2, 4, 8, … neighbours as well. Raises ConfigError.
    """
    num_devices = sum(home.tensor_parallel for home in homes)
    if not layers and len(homes) > 1 and num_devices == len(homes) and homes[0].device != "cpu":
        sizes = [2**power for power in range(1, num_devices.bit_length()) if 2**power <= num_devices]
        layers = [(size,) * (num_devices // size) for size in sizes]
    shared = []
    for layer in layers:
        if sum(layer) > num_devices:
            raise ConfigError(
                f"gpu_groups has shared groups {_listed(layer)} of {sum(layer)} GPUs, and its first groups have {num_devices}: give fewer"
            )
        first = 0
        for size in layer:
            shared.append(SharedGroup(_shared_config(homes, first, size, len(layers)), first, _overhead(homes[0])))
            first += size
    return shared


def share_devices(homes: Sequence[EngineConfig], shared: Sequence[SharedGroup]) -> list[EngineConfig]:
    """Return the configurations of the groups that start at once, given the shared groups of their devices.

    A third of the host memory that is configured is kept for shared groups.
    """
    numbers = {device for group in shared for device in range(group.first, group.first + group.config.tensor_parallel)}
    planned, first = [], 0
    for home in homes:
        if numbers.isdisjoint(range(first, first + home.tensor_parallel)):
            planned.append(home)
        else:
            planned.append(
                msgspec.structs.replace(
                    home,
                    shares_device=True,
                    host_budget_bytes=home.host_budget_bytes * 2 // 3,
                    host_kv_bytes=None if home.host_kv_bytes is None else home.host_kv_bytes * 2 // 3,
                )
            )
        first += home.tensor_parallel
    return planned


def _shared_config(homes: Sequence[EngineConfig], first: int, size: int, num_layers: int) -> EngineConfig:
    home = homes[0]
    kind, _, number = home.device.partition(":")
    return msgspec.structs.replace(
        home,
        device=f"{kind}:{int(number) + first}" if number else home.device,
        tensor_parallel=size,
        shares_device=True,
        host_sharers=num_layers,
        host_budget_bytes=home.host_budget_bytes // 3 // num_layers,
        host_kv_bytes=None if home.host_kv_bytes is None else home.host_kv_bytes // 3 // num_layers,
    )


def _overhead(home: EngineConfig) -> int:
    """Return the memory that a further process takes on a GPU. With a configured budget, such memory lies outside the budget."""
    return 0 if home.device == "cpu" or home.device_budget_bytes else home.device_reserve_bytes


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
