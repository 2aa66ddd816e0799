"""What `repertory serve` reports once it is ready: device, memory, addresses, keys, and a warning of an open server."""

import pytest

from common.units import GIB
from mesh.cli.banner import ServerFacts, is_open_to_network
from mesh.types import RuntimeSnapshot

GPU = RuntimeSnapshot(
    0,
    device_name="NVIDIA H200",
    device_budget_bytes=120 * GIB,
    device_reserve_bytes=6 * GIB,
    host_budget_bytes=64 * GIB,
)
CPU = RuntimeSnapshot(0, device_name="x86_64", device_budget_bytes=2 * GIB)


def facts(snapshot: RuntimeSnapshot = GPU, http: str = "127.0.0.1:8080", keys: int = 0) -> ServerFacts:
    return ServerFacts(4.94, http, "127.0.0.1:8033", keys, snapshot)


def test_banner_shows_device_addresses_and_keys() -> None:
    assert facts().banner() == (
        "Repertory is ready after 4.9 s\n"
        "  device  NVIDIA H200, 120 GiB for models, 6.0 GiB reserved outside, 64 GiB of host memory for evicted models\n"
        "  HTTP    http://127.0.0.1:8080  (OpenAI API below /v1, metrics at /metrics)\n"
        "  gRPC    127.0.0.1:8033\n"
        "  keys    none: every caller may use and change all models\n"
        "  next    repertory register NAME URI --load"
    )


def test_banner_of_a_cpu_with_keys_on_another_port() -> None:
    banner = facts(CPU, "0.0.0.0:80", keys=2).banner()
    assert "  device  x86_64, 2.0 GiB for models\n" in banner
    assert "  HTTP    http://127.0.0.1:80  (" in banner
    assert "  keys    2 accepted\n" in banner
    assert banner.endswith("--load --server http://127.0.0.1:80")


def test_fields_hold_sizes_in_bytes() -> None:
    assert facts(keys=1).fields()["device_reserve_bytes"] == 6 * GIB


@pytest.mark.parametrize("address", ["0.0.0.0:8080", "10.0.0.1:8080", "[::]:8080", ":8080", "gpu-a:8080"])
def test_warning_names_an_address_that_is_open_to_the_network(address: str) -> None:
    assert is_open_to_network(address)
    assert facts(http=address).warning().startswith(f"{address} can be reached from the network, and no API key is set")
    assert facts(http=address, keys=1).warning() == ""


@pytest.mark.parametrize("address", ["127.0.0.1:8080", "127.1.2.3:8080", "[::1]:8080", "localhost:80", "unix:/run/x"])
def test_banner_does_not_warn_of_an_address_of_this_machine(address: str) -> None:
    assert not is_open_to_network(address)
    assert facts(http=address).warning() == ""
