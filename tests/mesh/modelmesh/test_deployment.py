"""A pod as a process, configured by nothing but the variables that ModelMesh's controller sets for its container."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest

from tests.support.etcd import EtcdServer, free_port
from tests.support.tls import Authority
from tests.support.waiting import until
from wire.mmesh import model_mesh_pb2 as mm
from wire.mmesh.model_mesh_pb2_grpc import ModelMeshStub

CONSTRAINTS = {"rt:repertory": {"required": ["rt:repertory"]}, "_default": {"required": ["_no_runtime"]}}
DATAPLANE = {
    "rpcConfigs": {"test.Any/Echo": {"idExtractionPath": [1], "vModelId": True}},
    "allowOtherRpcs": True,
}


class Deployment:
    """The pod's ports, which a container would not have to choose."""

    def __init__(self, directory: Path, etcd: EtcdServer, *, tls: bool) -> None:
        self.directory = directory
        self.grpc, self.probe, self.prestop, self.metrics, http, *peers = (free_port() for _ in range(7))
        files = {
            "etcd_connection": {"endpoints": f"http://{etcd.endpoint}", "root_prefix": "/root"},
            "type_constraints": CONSTRAINTS,
            "dataplane_api_config": DATAPLANE,
        }
        for name, content in files.items():
            (directory / name).write_text(json.dumps(content))
        self.environment = {
            "MM_SERVICE_NAME": "modelmesh-serving",
            "MM_SVC_GRPC_PORT": str(self.grpc),
            "WKUBE_POD_NAME": "modelmesh-serving-repertory-6f8d9c7b5-x2k4p",
            "WKUBE_POD_IPADDR": "127.0.0.1",
            "MM_LOCATION": "10.0.0.7",
            "KV_STORE": f"etcd:{directory}/etcd_connection",
            "MM_METRICS": f"prometheus:port={self.metrics};scheme=http",
            "SHUTDOWN_TIMEOUT_MS": "90000",
            "MM_KVSTORE_PREFIX": "mm",
            "MM_DEFAULT_VMODEL_OWNER": "ksp",
            "MM_LABELS": "mt:llm,rt:repertory",
            "MM_TYPE_CONSTRAINTS_PATH": f"{directory}/type_constraints",
            "MM_DATAPLANE_CONFIG_PATH": f"{directory}/dataplane_api_config",
            "MM_PAYLOAD_PROCESSORS": "logger://*?*",
            "INTERNAL_GRPC_SOCKET_PATH": f"{directory}/runtime.sock",
            "MM_PROBE_PORT": str(self.probe),
            "MM_PRESTOP_WAIT_PORT": str(self.prestop),
            "REPERTORY_HTTP_LISTEN": f"127.0.0.1:{http}",
        }
        self.credentials: grpc.ChannelCredentials | None = None
        if tls:
            authority = Authority("company")
            certificate, key = authority.issue(directory / "tls", "modelmesh-serving.models.svc")
            trusted = authority.write(directory / "tls" / "ca.crt")
            self.environment |= {
                "MM_TLS_KEY_CERT_PATH": certificate,
                "MM_TLS_PRIVATE_KEY_PATH": key,
                "MM_TLS_CLIENT_AUTH": "REQUIRE",
                "MM_TLS_TRUST_CERT_PATH": f"{certificate},{trusted}",
                "REPERTORY_PEER_GRPC_LISTEN": f"127.0.0.1:{peers[0]}",
                "REPERTORY_PEER_HTTP_LISTEN": f"127.0.0.1:{peers[1]}",
            }
            own, own_key = authority.issue(directory / "client", "client")
            held = [Path(path).read_bytes() for path in (trusted, own_key, own)]
            self.credentials = grpc.ssl_channel_credentials(*held)

    def channel(self) -> grpc.aio.Channel:
        address = f"127.0.0.1:{self.grpc}"
        if self.credentials is None:
            return grpc.aio.insecure_channel(address)
        return grpc.aio.secure_channel(address, self.credentials)

    @contextmanager
    def running(self) -> Iterator["subprocess.Popen[bytes]"]:
        runtime = [sys.executable, "-m", "tests.support.modelmesh_runtime", str(self.directory), "2"]
        pod = [sys.executable, "-m", "mesh", "serve-mesh"]
        with (self.directory / "log").open("wb") as log:
            processes = [
                subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **self.environment})
                for command in (runtime, pod)
            ]
        try:
            yield processes[1]
        finally:
            for process in processes:
                process.kill()
                process.wait()

    def status(self, port: int, path: str, timeout_s: float = 2.0) -> int:
        """The HTTP status; 0 if nothing answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=timeout_s) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def text(self, port: int, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return str(answer.read().decode())


@pytest.mark.parametrize("tls", [False, True])
async def test_deployment_serves_as_the_controller_expects(own_etcd: EtcdServer, tmp_path: Path, tls: bool) -> None:
    deployment = Deployment(tmp_path, own_etcd, tls=tls)
    with deployment.running() as pod:
        await until(lambda: deployment.status(deployment.probe, "/ready") == 200, 60)
        assert deployment.status(deployment.probe, "/live") == 200
        async with deployment.channel() as channel:
            management = ModelMeshStub(channel)
            info = mm.ModelInfo(type="rt:repertory", path="file:///m?size=1")
            request = mm.SetVModelRequest(
                vModelId="v", targetModelId="v__ksp-1", modelInfo=info, loadNow=True, sync=True
            )
            status = await management.setVModel(request)
            assert status.owner == "ksp"
            assert status.activeModelStatus.status == mm.ModelStatusInfo.LOADED
            (copy,) = status.activeModelStatus.modelCopyInfos
            assert copy.location == "d9c7b5-x2k4p"
            echo: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/test.Any/Echo")
            assert await echo(b"\x0a\x01v") == b"\x0a\x01v", "the vmodel's id is read from the message"
            unmatched = mm.ModelInfo(type="mt:other", path="file:///m?size=1")
            refused = await management.registerModel(
                mm.RegisterModelRequest(modelId="other", modelInfo=unmatched, loadNow=True, sync=True)
            )
            assert refused.errors[0].startswith("There are no running instances that meet the label requirements")
        assert "modelmesh_models_loaded_total 1.0" in deployment.text(deployment.metrics, "/metrics")

        reader, writer = await asyncio.open_connection("127.0.0.1", deployment.prestop)
        writer.write(b"GET /prestop HTTP/1.1\r\nHost: pod\r\n\r\n")
        pod.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(reader.readline(), 60) == b"HTTP/1.1 200 OK\r\n"
        writer.close()
        assert await asyncio.to_thread(pod.wait, 30) == 0
    log = (tmp_path / "log").read_text()
    assert "MM_PAYLOAD_PROCESSORS is ignored" in log
    assert "mesh.requests" not in log, "MM_LOG_EACH_INVOKE is not set"
