"""What `repertory serve` and the configuration take and refuse: one line that names the value, status 2, and no secret shown."""

import argparse
import fcntl
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from common.config import load, unknown_variables
from common.errors import ConfigError
from common.units import GIB
from mesh.cli import serve_flags
from mesh.cli.main import main
from mesh.cli.serve_settings import SHARED_FIELDS, Settings, settings_of
from mesh.config.schema import MeshConfig
from mesh.errors import InvalidRequest
from runtime.config.loader import configure
from runtime.config.schema import RuntimeConfig


def settings(*arguments: str, env: dict[str, str] | None = None) -> Settings:
    parser = argparse.ArgumentParser()
    serve_flags.add_flags(parser)
    return settings_of(parser.parse_args(arguments), env or {})


@pytest.mark.parametrize(
    "arguments",
    [
        ("--wait-budget", "soon"),
        ("--wait-budget", "-1"),
        ("--grace", "nan"),
        ("--memory", "much"),
        ("--cache-size", "12XB"),
        ("--host-kv", "-1"),
        ("--device", "gpu"),
        ("--oversubscribe", "tape"),
        ("--tensor-parallel", "0"),
        ("--gpu-groups", "2,x"),
        ("--gpu-groups", "1,1+"),
        ("--log-level", "loud"),
        ("--http-listen", "99999"),
        ("--http-listen", "127.0.0.1:99999"),
        ("--grpc-listen", "unix:"),
    ],
)
def test_serve_refuses_a_bad_flag_by_name(
    arguments: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flag, value = arguments
    for given in (["serve", flag, value], ["serve"]):
        with pytest.raises(SystemExit) as ended:
            main(given)
        assert ended.value.code == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert flag in said
        assert value in said
        # and the same from the environment
        monkeypatch.setenv("REPERTORY_" + flag.removeprefix("--").replace("-", "_").upper(), value)


@pytest.mark.parametrize("flag", ["--tensor-parallel", "--num-shard", "--tensor-parallel-size"])
def test_tensor_parallel_accepts_the_names_of_other_launchers(flag: str) -> None:
    assert settings(flag, "2").runtime["engine"]["tensor_parallel"] == 2


def test_gpu_groups_reach_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings("--gpu-groups", "2, 1,1").runtime["gpu_groups"] == "2,1,1"
    assert settings("--gpu-groups", "1,1 + 2").runtime["gpu_groups"] == "1,1+2"
    assert settings().runtime["gpu_groups"] == ""
    monkeypatch.setenv("REPERTORY_GPU_GROUPS", "1,1")
    assert settings().runtime["gpu_groups"] == "1,1"


def test_help_never_shows_a_key(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPERTORY_API_KEYS", "nobody-may-read")
    monkeypatch.setenv("REPERTORY_API_KEY", "nobody-may-read")
    for verb in ("serve", "ps", "serve-mesh"):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        said = capsys.readouterr().out
        assert "REPERTORY_API_KEY" in said
        assert "nobody-may-read" not in said


def test_settings_of_flags_and_environment_reach_both_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REPERTORY_MEMORY", "2GiB")
    monkeypatch.setenv("REPERTORY_LOG_JSON", "0")
    found = settings("--home", str(tmp_path), "--cache-size", "1GiB", "--grace", "3", "--api-keys", "a, b")
    assert found.runtime["engine"]["device_budget_bytes"] == 2 * 1024**3
    assert found.runtime["cache_budget_bytes"] == 1024**3
    assert found.runtime["grace_s"] == found.mesh["grace_s"] == 3
    assert found.mesh["log_json"] is False
    assert found.mesh["api_keys"] == ("a", "b")


@pytest.mark.parametrize("text", ["mesh: 3", "runtime: [a]", "runtime: {engine: many}", "other: {}", "- a"])
def test_settings_of_a_file_of_another_shape_are_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=str(file)):
        settings("--config", str(file))


@pytest.mark.parametrize(
    "line", ["log_level: loud", "grace_s: long", "wait_budget_s: -1", "http_listen: [a]", "api_keys: null"]
)
def test_serve_refuses_a_bad_value_in_a_file_before_anything_is_started(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"mesh: {{{line}}}")
    assert main(["serve", "--home", str(tmp_path / "home"), "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert line.partition(":")[0] in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "home").exists()


def test_settings_of_a_binary_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=str(file)):
        settings("--config", str(file))
    with pytest.raises(ConfigError, match=str(file)):
        load(MeshConfig, flags={}, env={}, file=file)


def test_settings_of_empty_sections_are_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("mesh:\nruntime:\n")
    assert settings("--config", str(file)) == settings()


@pytest.mark.parametrize(
    ("arguments", "size"),
    [((), None), (("--host-kv", ""), None), (("--host-kv", "0"), 0), (("--host-kv", "4GiB"), 4 << 30)],
)
def test_host_kv_of_nothing_is_not_the_default(arguments: tuple[str, ...], size: int | None) -> None:
    assert settings(*arguments).runtime["engine"]["host_kv_bytes"] == size
    own = tuple(argument for argument in arguments if argument)
    assert len(own) == 1 or configure(own, {}).engine.host_kv_bytes == size


@pytest.mark.parametrize(
    ("field", "value"), [("wait_budget_s", -1), ("keep_alive_s", 0), ("log_level", "loud"), ("session_ttl_s", 0)]
)
def test_mesh_config_refuses_an_impossible_value(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        load(MeshConfig, flags={field: value}, env={})


@pytest.mark.parametrize(
    "flags", [("--device", "gpu"), ("--oversubscribe", "tape"), ("--kv-dtype", "int4"), ("--max-rows", "0")]
)
def test_runtime_config_refuses_an_impossible_value(flags: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=flags[0].removeprefix("--").replace("-", "_")):
        configure(flags, {})
    assert isinstance(configure((), {}), RuntimeConfig)


def serve_mesh(*arguments: str) -> tuple[int, str]:
    """As a process: it sets logging up. Exit status and stderr."""
    ended = subprocess.run(
        [sys.executable, "-m", "mesh", "serve-mesh", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return ended.returncode, ended.stderr


def test_serve_mesh_with_an_impossible_address_exits_with_status_2(tmp_path: Path) -> None:
    status, said = serve_mesh("--store", f"embedded:{tmp_path}", "--http-listen", "99999")
    assert status == 2
    assert "http_listen '99999'" in said


def test_serve_reports_a_taken_port_before_anything_is_started(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for flag in ("--http-listen", "--grpc-listen"):
            given = {"--http-listen": "127.0.0.1:0", "--grpc-listen": "127.0.0.1:0", flag: address}
            assert main(["serve", "--home", str(tmp_path), *(word for pair in given.items() for word in pair)]) == 1
            said = capsys.readouterr().err
            assert address in said
            assert len(said.splitlines()) == 1
        status, said = serve_mesh(
            "--store", f"embedded:{tmp_path}", "--http-listen", address, "--grpc-listen", "127.0.0.1:0"
        )
        assert status == 1
        assert f"HTTP address {address} cannot be listened on" in said
    assert not list((tmp_path / "run").glob("*.json"))


def test_serve_refuses_a_home_that_another_serve_uses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The second would write the configuration that the first one's children are started again with."""
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert (
            main(["serve", "--home", str(tmp_path), "--http-listen", "127.0.0.1:0", "--grpc-listen", "127.0.0.1:0"])
            == 1
        )
    assert str(tmp_path) in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*.json"))


def test_serve_reports_an_impossible_home_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert main(["serve", "--home", str(tmp_path / "file")]) == 1
    said = capsys.readouterr().err
    assert str(tmp_path / "file") in said
    assert len(said.splitlines()) == 1


def test_settings_of_flag_and_environment_override_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "mesh: {wait_budget_s: 1, http_listen: '127.0.0.1:1', keep_alive_s: 2}\n"
        "runtime: {grace_s: 4, engine: {device: cuda, device_budget_bytes: 1GiB, max_rows: 9}}\n"
    )
    monkeypatch.setenv("REPERTORY_DEVICE", "cpu")
    found = settings("--config", str(file), "--http-listen", "127.0.0.1:2", "--memory", "2GiB", "--no-log-json")
    assert found.mesh["http_listen"] == "127.0.0.1:2"
    assert found.mesh["wait_budget_s"] == 1
    assert found.mesh["keep_alive_s"] == 2
    assert found.mesh["log_json"] is False
    assert found.runtime["grace_s"] == 4
    assert found.runtime["engine"]["device"] == "cpu"
    assert found.runtime["engine"]["device_budget_bytes"] == 2 * GIB
    assert found.runtime["engine"]["max_rows"] == 9


def test_settings_of_a_flag_at_its_default_value_still_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("runtime: {engine: {device: cuda}}\nmesh: {grace_s: 5}\n")
    found = settings("--config", str(file), "--device", "auto", "--grace", "30")
    assert found.runtime["engine"]["device"] == "auto"
    assert found.mesh["grace_s"] == found.runtime["grace_s"] == 30


def test_settings_of_the_environment_reach_the_process_that_has_them(tmp_path: Path) -> None:
    """Also settings without a flag of `serve`: a dropped `REPERTORY_MODEL_ROOTS` would be a hole in security."""
    env = {
        "REPERTORY_KEEP_ALIVE_S": "7",
        "REPERTORY_ALLOW_PICKLE": "true",
        "REPERTORY_MAX_ROWS": "9",
        "REPERTORY_LOAD_TIMEOUT_S": "11",
        "REPERTORY_LISTEN": "unix:/elsewhere",
        "REPERTORY_GRACE_S": "3",
        "OTHER": "x",
    }
    found = settings("--home", str(tmp_path), env=env)
    assert found.mesh["keep_alive_s"] == 7
    assert found.mesh["load_timeout_s"] == 11
    assert found.mesh["grace_s"] == 3
    assert found.runtime_environment == {
        name: env[name]
        for name in (
            "REPERTORY_ALLOW_PICKLE",
            "REPERTORY_MAX_ROWS",
            "REPERTORY_LOAD_TIMEOUT_S",
            "REPERTORY_GRACE_S",
        )
    }
    with_flag = settings("--home", str(tmp_path), "--grace", "5", env=env)
    assert with_flag.mesh["grace_s"] == 5
    assert "REPERTORY_GRACE_S" not in with_flag.runtime_environment


def test_settings_of_a_bad_variable_name_it() -> None:
    with pytest.raises(ConfigError, match="keep_alive_s"):
        settings(env={"REPERTORY_KEEP_ALIVE_S": "0"})
    with pytest.raises(ConfigError, match="environment variable REPERTORY_HTTP_MAX_BODY_BYTES"):
        settings(env={"REPERTORY_HTTP_MAX_BODY_BYTES": "much"})


def test_shared_fields_are_those_that_both_processes_have() -> None:
    for_the_mesh_alone = {"http_listen", "grpc_listen", "allowed_hosts", "cors_origins"}
    both = set(MeshConfig.__struct_fields__) & set(RuntimeConfig.__struct_fields__)
    assert both - for_the_mesh_alone == SHARED_FIELDS


def test_unknown_variables_are_those_that_set_nothing() -> None:
    env = dict.fromkeys(
        (
            "REPERTORY_MODEL_ROOT",
            "REPERTORY_MODEL_ROOTS",
            "REPERTORY_MAX_ROWS",
            "REPERTORY_SERVER",
            "REPERTORY_SERVICE_HOST",
            "REPERTORY_PORT_8080_TCP_ADDR",
            "REPERTORY_PORT",
            "HOME",
        ),
        "",
    )
    assert unknown_variables(env, RuntimeConfig) == ["REPERTORY_MODEL_ROOT"]


@pytest.mark.parametrize(
    "store", ["etcd-0.example:2379", "10.0.0.1:2379,10.0.0.2:2379", "[::1]:2379", "host:2379/prefix"]
)
def test_settings_of_a_store_without_a_scheme_are_refused_with_a_hint(store: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=f"write etcd://{re.escape(store)}"):
        settings("--home", str(tmp_path), "--store", store)
    assert settings("--home", str(tmp_path), "--store", str(tmp_path / "a:1")).mesh["store"] == str(tmp_path / "a:1")


def test_serve_refuses_an_invalid_models_file_before_anything_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "models.yaml"
    file.write_text("models: {a: {uri: /a, quantize: nf5}}")
    assert main(["serve", "--home", str(tmp_path / "home"), "--models", str(file)]) == 2
    said = capsys.readouterr().err
    assert str(file) in said
    assert "quantize is 'nf5'" in said
    assert not (tmp_path / "home").exists()
