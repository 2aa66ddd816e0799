"""Describes a server that has started: its device and memory, its addresses, and whether callers need a key."""

import ipaddress
from dataclasses import dataclass
from typing import Any

from common.addresses import parse_address
from common.units import size
from mesh.cli.supervised_process import reachable
from mesh.client.admin import DEFAULT_SERVER
from mesh.types import RuntimeSnapshot


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """`http` and `grpc` are the addresses to listen on; `seconds` is the time until the server was ready."""

    seconds: float
    http: str
    grpc: str
    num_keys: int
    snapshot: RuntimeSnapshot
    keys_file: str = ""
    tls: bool = False
    envoy: str = ""

    def banner(self) -> str:
        """Return the lines that a person reads: the device, the addresses, the keys and the next command."""
        server = "" if self._url == DEFAULT_SERVER else f" --server {self._url}"
        rows = [
            ("device", self._device()),
            ("HTTP", f"{self._url}  (OpenAI API below /v1, metrics at /metrics)"),
            ("gRPC", self.grpc),
            *([("Envoy", "carries the calls of loaded models")] if self.envoy else []),
            (
                "keys",
                self._keys() or "none: every caller may use and change all models",
            ),
            ("next", f"repertory register NAME URI --load{server}"),
        ]
        lines = "\n".join(f"  {name:<8}{value}" for name, value in rows)
        return f"Repertory is ready after {self.seconds:.1f} s\n{lines}"

    def fields(self) -> dict[str, Any]:
        """Return the same facts for a log line."""
        return {
            "seconds": round(self.seconds, 1),
            "http": self._url,
            "grpc": self.grpc,
            "envoy": bool(self.envoy),
            "device": self.snapshot.device_name,
            "device_budget_bytes": self.snapshot.device_budget_bytes,
            "device_reserve_bytes": self.snapshot.device_reserve_bytes,
            "host_budget_bytes": self.snapshot.host_budget_bytes,
            "api_keys": self.num_keys,
        }

    def warning(self) -> str:
        """Return a warning if other machines can reach the server and callers need no key, else an empty text."""
        reached = [address for address in (self.http, self.grpc) if is_open_to_network(address)]
        if self._keys() or not reached:
            return ""
        return (
            f"{' and '.join(reached)} can be reached from the network, and no API key is set: anyone there can use, register and "
            "remove models. Set --api-keys or --api-keys-file, or listen on 127.0.0.1"
        )

    @property
    def _url(self) -> str:
        scheme = "https" if self.tls else "http"
        return self.http if self.http.startswith("unix:") else f"{scheme}://{reachable(self.http)}"

    def _keys(self) -> str:
        found = [f"{self.num_keys} accepted"] if self.num_keys else []
        return ", and ".join([*found, *([f"those of {self.keys_file}"] if self.keys_file else [])])

    def _device(self) -> str:
        found = self.snapshot
        parts = [f"{found.device_name or 'unknown'}, {size(found.device_budget_bytes)} for models"]
        if found.device_reserve_bytes:
            parts.append(f"{size(found.device_reserve_bytes)} reserved outside")
        if found.host_budget_bytes:
            parts.append(f"{size(found.host_budget_bytes)} of host memory for evicted models")
        return ", ".join(parts)


def is_open_to_network(address: str) -> bool:
    """Return whether other machines may reach an address to listen on."""
    parsed = parse_address(address)
    if parsed.path or parsed.host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(parsed.host).is_loopback
    except ValueError:
        return True  # a name, which stands for some interface
