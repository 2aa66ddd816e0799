"""Which devices each engine of a runtime owns, and its part of the host's memory."""

from pathlib import Path

import pytest

from common.errors import ConfigError
from runtime.config.schema import EngineConfig
from runtime.engine_client.group_plan import device_names, parse_groups, plan_groups, plan_shared_groups, share_devices
from runtime.engine_client.visible_gpus import count_gpus, visible_gpus


@pytest.mark.parametrize(
    ("device", "tensor_parallel", "sizes", "num_visible", "expected"),
    [
        ("auto", 1, (), 0, [("auto", 1)]),
        ("auto", 1, (), 1, [("auto", 1)]),
        ("auto", 1, (), 3, [("cuda:0", 1), ("cuda:1", 1), ("cuda:2", 1)]),
        ("cuda", 2, (), 5, [("cuda:0", 2), ("cuda:2", 2)]),
        ("cuda", 4, (), 2, [("cuda", 4)]),  # The engine says that there are too few GPUs.
        ("cuda:1", 1, (), 0, [("cuda:1", 1)]),  # GPUs are not counted then.
        ("cuda:1", 2, (), 4, [("cuda:1", 2)]),
        ("auto", 1, (2, 1, 1), 4, [("cuda:0", 2), ("cuda:2", 1), ("cuda:3", 1)]),
        ("cuda:1", 1, (1, 2), 4, [("cuda:1", 1), ("cuda:2", 2)]),
        ("cpu", 2, (), 0, [("cpu", 2)]),
        ("cpu", 1, (2, 1), 0, [("cpu", 2), ("cpu", 1)]),
    ],
)
def test_plan_groups_divides_the_devices(
    device: str, tensor_parallel: int, sizes: tuple[int, ...], num_visible: int, expected: list[tuple[str, int]]
) -> None:
    engine = EngineConfig(device=device, tensor_parallel=tensor_parallel)
    planned = plan_groups(engine, sizes, num_visible)
    assert [(one.device, one.tensor_parallel) for one in planned] == expected


def test_plan_groups_divides_host_memory() -> None:
    planned = plan_groups(EngineConfig(device="cpu", host_budget_bytes=800, host_kv_bytes=80), (2, 1, 1), 0)
    assert {(one.host_budget_bytes, one.host_kv_bytes, one.host_sharers) for one in planned} == {(200, 20, 4)}


@pytest.mark.parametrize(
    ("device", "tensor_parallel", "sizes", "num_visible", "text"),
    [
        ("auto", 1, (2, 1), 2, "needs 3 GPUs, and 2 are visible"),
        ("cuda:1", 1, (1, 1), 2, "from cuda:1 on needs 3 GPUs"),
        ("auto", 1, (1, 1), 0, "no GPU is visible"),
        ("cpu", 2, (1, 1), 0, "are both given"),
    ],
)
def test_plan_groups_refuses_what_the_machine_lacks(
    device: str, tensor_parallel: int, sizes: tuple[int, ...], num_visible: int, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        plan_groups(EngineConfig(device=device, tensor_parallel=tensor_parallel), sizes, num_visible)


@pytest.mark.parametrize(
    ("num_gpus", "expected"),
    [
        (1, []),
        (2, [("cuda:0", 2, 0)]),
        (3, [("cuda:0", 2, 0)]),
        (4, [("cuda:0", 2, 0), ("cuda:2", 2, 2), ("cuda:0", 4, 0)]),
    ],
)
def test_plan_shared_groups_forms_powers_of_two_of_single_gpus(
    num_gpus: int, expected: list[tuple[str, int, int]]
) -> None:
    homes = plan_groups(EngineConfig(), (), num_gpus)
    shared = plan_shared_groups(homes, ())
    assert [(group.config.device, group.config.tensor_parallel, group.first) for group in shared] == expected
    assert all(group.config.shares_device for group in shared)


def test_plan_shared_groups_follows_the_layers_that_are_given() -> None:
    sizes, *layers = parse_groups("1,1,2+2,2+4")
    homes = plan_groups(EngineConfig(device="cpu"), sizes, 0)
    shared = plan_shared_groups(homes, layers)
    assert [(group.config.device, group.config.tensor_parallel, group.first) for group in shared] == [
        ("cpu", 2, 0),
        ("cpu", 2, 2),
        ("cpu", 4, 0),
    ]
    assert plan_shared_groups(plan_groups(EngineConfig(device="cpu"), (1, 1), 0), ()) == []
    with pytest.raises(ConfigError, match="shared groups 2,2 of 4 GPUs, and its first groups have 3"):
        plan_shared_groups(homes[:1] * 3, ((2, 2),))
    with pytest.raises(ConfigError, match="between 1 and 64"):
        parse_groups("1,0")


def test_shared_groups_have_a_third_of_the_host_memory() -> None:
    homes = plan_groups(EngineConfig(device="cuda", host_budget_bytes=1200, host_kv_bytes=120), (), 2)
    shared = plan_shared_groups(homes, ((2,), (2,)))
    homes = share_devices(homes, shared)
    assert {(home.host_budget_bytes, home.host_kv_bytes) for home in homes} == {(400, 40)}
    assert {(group.config.host_budget_bytes, group.config.host_kv_bytes) for group in shared} == {(100, 10)}
    assert 2 * 400 + 2 * 2 * 100 == 1200


def test_shared_groups_charge_the_memory_of_their_process_to_an_automatic_budget() -> None:
    automatic = plan_groups(EngineConfig(device="cuda", device_reserve_bytes=600), (), 2)
    assert [group.overhead_bytes for group in plan_shared_groups(automatic, ())] == [600]
    configured = plan_groups(EngineConfig(device="cuda", device_budget_bytes=5000), (), 2)
    assert [group.overhead_bytes for group in plan_shared_groups(configured, ())] == [0]


def test_device_names_are_those_of_the_driver_and_distinct_on_a_cpu() -> None:
    assert device_names("cuda:2", 2, 7, is_only=False) == ("cuda:2", "cuda:3")
    assert device_names("cpu", 2, 1, is_only=False) == ("cpu:1", "cpu:2")
    assert device_names("cpu", 1, 0, is_only=True) == ("cpu",)
    assert device_names("cuda:0", 1, 0, is_only=True) == ("cuda:0",)


def test_gpus_are_counted_without_a_driver(tmp_path: Path) -> None:
    assert count_gpus("no-such-library.so") == 0
    assert visible_gpus("auto", tmp_path) == 0
    for name in ("nvidia0", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert visible_gpus("auto", tmp_path) == 1
    assert visible_gpus("cpu", tmp_path) == 0
