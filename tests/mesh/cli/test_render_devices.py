"""What the command line shows of the devices of models and pods: nothing if there is one only."""

import io
from typing import Any

import msgspec
import pytest
from rich.console import Console

from common.model_state import DeviceFigures
from common.units import GIB
from mesh.cli.render import model_columns, pod_columns, show_model
from mesh.client.admin import Copy, Model
from tests.support.admin_server import sample_pods


def model(name: str, devices: str, **figures: Any) -> Model:
    copy = Copy(instance_id="pod", status="LOADED", devices=devices, **figures)
    return Model(name, copies=[copy], status="LOADED", state="loaded")


def shown(models: list[Model]) -> list[str]:
    [column] = [column for column in model_columns(models, 0.0) if column.heading == "DEVICES"]
    return [str(cell) for cell in column.cells]


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (("cuda:0", "cuda:0"), ["", ""]),
        (("cuda:0", "cuda:1"), ["cuda:0", "cuda:1"]),
        (("cuda:0,cuda:1",), ["cuda:0+cuda:1"]),
        (("", ""), ["", ""]),
    ],
)
def test_model_columns_show_devices_where_there_are_several(devices: tuple[str, ...], expected: list[str]) -> None:
    assert shown([model(f"m{number}", names) for number, names in enumerate(devices)]) == expected


def test_pod_columns_show_what_each_device_uses() -> None:
    first, second = sample_pods()
    devices = [
        DeviceFigures(name=f"cuda:{number}", group="cuda:0", budget_bytes=60 * GIB, used_bytes=number * 9 * GIB)
        for number in (0, 1)
    ]
    pods = [msgspec.structs.replace(first, devices=devices), msgspec.structs.replace(second, devices=devices[:1])]
    [column] = [column for column in pod_columns(pods, 0.0) if column.heading == "DEVICES"]
    assert [str(cell) for cell in column.cells] == ["cuda:0 0 B of 60 GiB, cuda:1 9.0 GiB of 60 GiB", ""]


def test_show_model_states_the_bytes_on_each_device() -> None:
    output = io.StringIO()
    show_model(
        Console(file=output, width=200), model("big", "cuda:0,cuda:1", weight_bytes=134 * GIB, device_bytes=140 * GIB)
    )
    assert "cuda:0, cuda:1: on each 67 GiB of weights, 70 GiB in device memory" in output.getvalue()
