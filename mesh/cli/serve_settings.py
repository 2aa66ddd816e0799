"""Merges the settings of `repertory serve`, from flags, environment, file and defaults, into the configurations of its two processes."""

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from common.addresses import parse_address
from common.config import env_name, load, read_mapping
from common.errors import ConfigError
from mesh.config.schema import MeshConfig
from mesh.registry.models_file import read_models_file
from mesh.store.location import parse_store

# Fields that connect the two processes; `serve` sets them itself.
_WIRING = frozenset({"listen", "runtime_grpc", "runtime_http"})
# Fields of the mesh that the runtime has under the same name.
SHARED_FIELDS = frozenset(
    {"grace_s", "log_level", "log_json", "grpc_max_message_bytes", "http_max_body_bytes", "load_timeout_s"}
)
_PREFIX = env_name("")


@dataclass(frozen=True, slots=True)
class Settings:
    """The configurations of the two processes, as JSON objects of MeshConfig's and RuntimeConfig's fields.

    `runtime_environment` holds the REPERTORY_ variables that the runtime process reads itself.
    """

    run_dir: Path
    mesh: Mapping[str, Any]
    runtime: Mapping[str, Any]
    runtime_environment: Mapping[str, str] = field(default_factory=dict)


# The configuration fields that each flag of `serve` sets, as paths below `mesh` and `runtime`.
_FIELDS_OF_FLAG: dict[str, tuple[tuple[str, ...], ...]] = {
    "http_listen": (("mesh", "http_listen"),),
    "grpc_listen": (("mesh", "grpc_listen"),),
    "store": (("mesh", "store"),),
    "models": (("mesh", "models_file"),),
    "wait_budget": (("mesh", "wait_budget_s"), ("runtime", "engine", "wait_budget_s")),
    "api_keys": (("mesh", "api_keys"),),
    "api_keys_file": (("mesh", "api_keys_file"),),
    "envoy": (("mesh", "envoy"),),
    "workers": (("mesh", "workers"),),
    "tls_cert": (("mesh", "tls_cert"),),
    "tls_key": (("mesh", "tls_key"),),
    "allowed_hosts": (("mesh", "allowed_hosts"),),
    "cors_origins": (("mesh", "cors_origins"),),
    "memory": (("runtime", "engine", "device_budget_bytes"),),
    "host_memory": (("runtime", "engine", "host_budget_bytes"),),
    "host_kv": (("runtime", "engine", "host_kv_bytes"),),
    "device": (("runtime", "engine", "device"),),
    "tensor_parallel": (("runtime", "engine", "tensor_parallel"),),
    "gpu_groups": (("runtime", "gpu_groups"),),
    "oversubscribe": (("runtime", "engine", "oversubscribe"),),
    "cache_dir": (("runtime", "cache_dir"),),
    "model_roots": (("runtime", "model_roots"),),
    "source_hosts": (("runtime", "source_hosts"),),
    "cache_size": (("runtime", "cache_budget_bytes"),),
    "grace": (("mesh", "grace_s"), ("runtime", "grace_s")),
    "log_level": (("mesh", "log_level"), ("runtime", "log_level")),
    "log_json": (("mesh", "log_json"), ("runtime", "log_json")),
}


def settings_of(args: argparse.Namespace, env: Mapping[str, str] = os.environ) -> Settings:
    """Merge flags and their environment variables (`args.given` names those that were set), other environment variables, the file, and the
    defaults, in this order.

    Raises ConfigError for a bad file, models file or variable, InvalidRequest for a store that cannot be one.
    """
    run_dir = Path(args.home).expanduser() / "run"
    tree = _from_flags(args, run_dir)
    given = {path: _at(tree, path) for flag in args.given for path in _FIELDS_OF_FLAG.get(flag, ())}
    if args.config is not None:
        _overlay(args.config, tree)
    tree["mesh"].update(_mesh_environment(env))
    for path, value in given.items():
        _at(tree, path[:-1])[path[-1]] = value
    mesh = tree["mesh"]
    if empty := next((name for name, value in mesh.items() if value is None), None):
        raise ConfigError(f"configuration file {args.config}: {empty} of `mesh:` has no value")
    # Check and normalise the mesh's settings. The runtime checks its own when it starts.
    known = msgspec.to_builtins(load(MeshConfig, flags=mesh, env={}))
    mesh |= {name: value for name, value in known.items() if name in mesh}
    for name in ("grpc_listen", "http_listen"):
        parse_address(str(mesh[name]), name)
    parse_store(str(mesh["store"]))
    if file := mesh["models_file"]:
        read_models_file(str(file))
    return Settings(run_dir, mesh, tree["runtime"], _runtime_environment(env, {path[-1] for path in given}))


def mesh_config(settings: Settings) -> MeshConfig:
    """Return the mesh's settings as its process reads them."""
    return load(MeshConfig, flags=settings.mesh, env={})


def _mesh_environment(env: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields of the mesh that the environment sets. Raises ConfigError."""
    names = [name for name in MeshConfig.__struct_fields__ if env_name(name) in env and name not in _WIRING]
    found = msgspec.to_builtins(load(MeshConfig, flags={}, env={env_name(name): env[env_name(name)] for name in names}))
    return {name: found[name] for name in names}


def _runtime_environment(env: Mapping[str, str], given: set[str]) -> dict[str, str]:
    """Return the variables for the runtime: all but those of `serve`'s flags, of the mesh alone, and of fields that a flag sets."""
    flags = {*_FIELDS_OF_FLAG, "home"}
    mesh_only = set(MeshConfig.__struct_fields__) - SHARED_FIELDS
    handled = {env_name(name) for name in flags | mesh_only | given | _WIRING}
    return {name: value for name, value in env.items() if name.startswith(_PREFIX) and name not in handled}


def _from_flags(args: argparse.Namespace, run_dir: Path) -> dict[str, Any]:
    home = run_dir.parent
    both = {"log_json": args.log_json, "log_level": args.log_level, "grace_s": args.grace}
    runtime = {
        "listen": [f"unix:{run_dir}/runtime.sock"],
        "http_listen": f"unix:{run_dir}/runtime-http.sock",
        "cache_dir": str(Path(args.cache_dir).expanduser() if args.cache_dir else home / "cache"),
        "cache_budget_bytes": args.cache_size,
        "model_roots": _listed(args.model_roots) or [str(home / "models")],
        "source_hosts": _listed(args.source_hosts),
        "gpu_groups": args.gpu_groups,
        "engine": {
            "device": args.device,
            "tensor_parallel": args.tensor_parallel,
            "oversubscribe": args.oversubscribe,
            "device_budget_bytes": args.memory,
            "host_budget_bytes": args.host_memory,
            "host_kv_bytes": args.host_kv,
            "wait_budget_s": max(args.wait_budget, 1.0),
        },
        **both,
    }
    mesh = {
        "grpc_listen": args.grpc_listen,
        "http_listen": args.http_listen,
        "store": args.store or f"embedded:{home / 'registry'}",
        "models_file": args.models,
        "runtime_grpc": runtime["listen"][0],
        "runtime_http": runtime["http_listen"],
        "wait_budget_s": args.wait_budget,
        "api_keys": tuple(_listed(args.api_keys)),
        "api_keys_file": args.api_keys_file,
        "envoy": args.envoy,
        "workers": args.workers,
        "envoy_dir": str(run_dir / "envoy"),
        "tls_cert": args.tls_cert,
        "tls_key": args.tls_key,
        "allowed_hosts": tuple(_listed(args.allowed_hosts)),
        "cors_origins": tuple(_listed(args.cors_origins)),
        **both,
    }
    return {"mesh": mesh, "runtime": runtime}


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _at(tree: dict[str, Any], path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _overlay(file: Path, tree: dict[str, Any]) -> None:
    content = read_mapping(file)
    if set(content) - {"mesh", "runtime"}:
        raise ConfigError(f"configuration file {file}: expected the sections `mesh:` and `runtime:`")
    mesh, runtime = tree["mesh"], tree["runtime"]
    mesh.update(_section(file, "mesh", content.get("mesh")))
    section = dict(_section(file, "runtime", content.get("runtime")))
    runtime["engine"] = {**runtime["engine"], **_section(file, "engine", section.pop("engine", None))}
    runtime.update(section)


def _section(file: Path, name: str, content: object) -> Mapping[str, Any]:
    if not isinstance(content, dict | None):
        raise ConfigError(f"configuration file {file}: `{name}:` must hold `field: value` lines")
    return content or {}
