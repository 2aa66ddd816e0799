"""docker/ and deploy/ say what the programs take: command lines, ports, folders and volumes. Nothing is built or applied here."""

import argparse
import configparser
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

from common.config import load
from mesh.cli import serve_flags
from mesh.config.modelmesh_environment import translate
from mesh.config.schema import MeshConfig
from mesh.envoy.binary import ELSEWHERE
from mesh.envoy.files import EnvoyFiles
from runtime.config.loader import configure
from runtime.config.schema import RuntimeConfig

ROOT = Path(__file__).resolve().parents[2]


def serve(command: list[str]) -> argparse.Namespace:
    """What `repertory serve …` understands of it; SystemExit if it takes it not."""
    parser = argparse.ArgumentParser()
    serve_flags.add_flags(parser)
    assert command[0] == "serve"
    return parser.parse_args(command[1:])


def port(address: str) -> str:
    return address.rpartition(":")[2]


def dockerfile() -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "docker" / "Dockerfile").read_text(), flags=re.MULTILINE).replace(
        "\\\n", " "
    )
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def of(word: str) -> list[str]:
    return [rest for instruction, rest in dockerfile() if instruction == word]


def test_image_copies_existing_files_and_serves_on_the_ports_it_names() -> None:
    copied = [copy.split()[:-1] for copy in of("COPY") if not copy.startswith("--from")]
    taken = {word for words in copied for word in words if not word.startswith("--")}
    assert all((ROOT / source).exists() for source in taken)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {pattern.removesuffix("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert taken >= {"pyproject.toml", "LICENSE", project["project"]["readme"], *packages}
    assert json.loads(of("ENTRYPOINT")[0]) == ["repertory"]
    given = serve(json.loads(of("CMD")[0]))
    assert {port(given.http_listen), port(given.grpc_listen)} == set(of("EXPOSE")[0].split())
    asked = json.loads(of("HEALTHCHECK")[0].partition("CMD ")[2])
    assert f"127.0.0.1:{port(given.http_listen)}/healthz" in asked[-1]
    compile(asked[-1], "HEALTHCHECK", "exec")


def test_image_keeps_what_it_fetches_and_compiles_in_its_volume() -> None:
    set_to = dict(pair.split("=", 1) for pair in " ".join(of("ENV")).split())
    volume = of("VOLUME")[0]
    assert all(set_to[name].startswith(volume) for name in ("REPERTORY_HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR"))
    assert of("USER") == ["1000"]


def test_composed_pods_reach_their_store_and_publish_what_they_serve() -> None:
    composed: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    services = composed["services"]
    taken: set[str] = set()
    for name, pod in ((name, service) for name, service in services.items() if name != "etcd"):
        given = serve(pod["command"])
        host, _, store_port = given.store.removeprefix("etcd://").partition(":")
        assert f":{store_port}" in " ".join(services[host]["command"])
        assert {published.split(":")[1] for published in pod["ports"]} == {
            port(given.http_listen),
            port(given.grpc_listen),
        }, name
        outside = {published.split(":")[0] for published in pod["ports"]}
        assert not outside & taken
        taken |= outside
        assert (ROOT / "docker" / pod["build"]["context"] / pod["build"]["dockerfile"]).exists()
    assert {volume.split(":")[0] for service in services.values() for volume in service["volumes"]} == set(
        composed["volumes"]
    )


def test_composed_envoy_reads_what_its_pod_writes() -> None:
    services: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.envoy.yaml").read_text())["services"]
    pod, envoy = services["pod"], services["envoy"]
    given = serve(pod["command"])
    assert given.envoy == ELSEWHERE
    assert {published.split(":")[1] for published in envoy["ports"]} == {
        port(given.http_listen),
        port(given.grpc_listen),
    }
    volume = of("VOLUME")[0]
    assert pod["volumes"] == envoy["volumes"] == [f"home:{volume}"]
    assert [envoy["user"]] == of("USER")
    files = EnvoyFiles(Path(volume) / "run" / "envoy")
    assert envoy["entrypoint"][-1].count(str(files.bootstrap)) == 2


def test_serving_runtime_is_configured_as_modelmesh_calls_it() -> None:
    spec: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "servingruntime.yaml").read_text())["spec"]
    (container,) = spec["containers"]
    assert container["args"][0] == "serve-runtime"
    config = configure(container["args"][1:], {})
    assert {port(address) for address in config.listen} == {port(spec["grpcEndpoint"]), port(spec["grpcDataEndpoint"])}
    assert int(port(config.http_listen)) == container["livenessProbe"]["httpGet"]["port"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == {volume["name"] for volume in spec["volumes"]}
    set_to = {variable["name"]: variable["value"] for variable in container["env"] if "value" in variable}
    for folder in (config.cache_dir, config.storage_config_dir, *set_to.values()):
        assert any(folder == mount or folder.startswith(f"{mount}/") for mount in mounts), folder


def test_serving_runtime_has_nothing_that_the_controller_refuses() -> None:
    spec: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "servingruntime.yaml").read_text())["spec"]
    assert not {"readinessProbe", "lifecycle"} & spec["containers"][0].keys()
    reserved = re.compile(r"storage-config|models-dir|domain-socket|etcd-config|tc-config|mm-.*")
    assert not [volume["name"] for volume in spec["volumes"] if reserved.fullmatch(volume["name"])]


def test_mesh_under_the_controller_reaches_the_runtimes_http_port() -> None:
    runtime: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "servingruntime.yaml").read_text())["spec"]
    listens = configure(runtime["containers"][0]["args"][1:], {}).http_listen
    manifest: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "modelmesh-config.yaml").read_text())
    controller = yaml.safe_load(manifest["data"]["config.yaml"])
    variables = {variable["name"]: variable["value"] for variable in controller["internalModelMeshEnvVars"]}
    translated = translate({"MM_SERVICE_NAME": "modelmesh-serving"}).variables
    config = load(MeshConfig, flags={}, env={**translated, **variables})
    assert port(config.runtime_http) == port(listens)


def test_image_for_the_controller_starts_the_mesh_and_has_its_script() -> None:
    assert json.loads(of("CMD")[-1]) == ["serve-mesh"]
    script = next(copy for copy in of("COPY") if "modelmesh-stop.sh" in copy)
    assert script.split()[-1] == "/opt/kserve/mmesh/stop.sh"
    assert of("FROM")[-1] == "pod", "the image without a target is the one for all commands"


def production(heading: str) -> str:
    """Return the code of docs/production.md that begins with the comment `heading`."""
    text = (ROOT / "docs" / "production.md").read_text()
    found = re.search(rf"```\w*\n# {re.escape(heading)}.*?\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


def unit() -> configparser.ConfigParser:
    parsed = configparser.ConfigParser(interpolation=None, strict=False)
    parsed.optionxform = str  # type: ignore[assignment,method-assign]
    parsed.read_string(production("/etc/systemd/system/repertory.service"))
    return parsed


def test_systemd_unit_starts_serve_and_waits_for_its_grace() -> None:
    service = unit()["Service"]
    program, *command = service["ExecStart"].split()
    assert program == "/opt/repertory/bin/repertory"
    given = serve(command)
    assert given.home == f"/var/lib/{service['StateDirectory']}"
    for pair in service["Environment"].split():
        assert pair.partition("=")[2].startswith(given.home)
    assert int(service["TimeoutStopSec"]) > 2 * MeshConfig().grace_s
    assert service["KillMode"] == "mixed"


def test_configuration_of_production_is_read() -> None:
    sections: dict[str, Any] = yaml.safe_load(production("/etc/repertory/config.yaml"))
    assert sections.keys() == {"mesh", "runtime"}
    mesh = load(MeshConfig, flags={}, env={}, file=json.dumps(sections["mesh"]))
    assert (port(mesh.http_listen), port(mesh.grpc_listen)) == ("8080", "8033")
    assert mesh.api_keys_file == "/etc/repertory/keys.yaml"
    runtime = load(RuntimeConfig, flags={}, env={}, file=json.dumps(sections["runtime"]))
    assert runtime.storage_config_dir == "/etc/repertory/storage"
    assert runtime.engine.device_budget_bytes == 120 << 30
