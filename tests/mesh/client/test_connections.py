"""Connections to other pods: one that has fallen silent is found out, and a request that it had ends."""

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import grpc
import pytest

from mesh.client.connections import Connections, watched_socket

_SERVER = """
import time
from concurrent.futures import ThreadPoolExecutor
import grpc
def never(request, context):
    time.sleep(600)
server = grpc.server(ThreadPoolExecutor(2), options=(("grpc.http2.min_ping_interval_without_data_ms", 10),))
class Handler(grpc.GenericRpcHandler):
    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(never)
server.add_generic_rpc_handlers((Handler(),))
print(server.add_insecure_port("127.0.0.1:0"), flush=True)
server.start()
time.sleep(600)
"""


@pytest.fixture
def pod() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    with subprocess.Popen([sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"127.0.0.1:{int(process.stdout.readline())}", process
        finally:
            process.kill()


@pytest.mark.parametrize(
    "silent_s", [0.3, 4.0]
)  # the latter is several pings long, and gRPC would wait a minute for the next
async def test_connections_call_to_a_vanished_pod_ends(pod: tuple[str, subprocess.Popen[str]], silent_s: float) -> None:
    address, process = pod
    connections = Connections(max_message_bytes=1 << 20, ping_s=0.5, pong_s=0.5)
    try:
        channel = connections.grpc(address, of_pod=True)
        await asyncio.wait_for(channel.channel_ready(), 30)
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/any/Method")
        call = method(b"")
        await asyncio.wait([asyncio.ensure_future(call.code())], timeout=silent_s)
        process.send_signal(signal.SIGSTOP)  # its kernel still takes bytes, and the process does not answer
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(call, 30)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        await connections.close()


def test_connections_http_uses_tcp_keepalive() -> None:
    with watched_socket((socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 1))) as made:
        assert made.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        if hasattr(socket, "TCP_KEEPIDLE"):
            assert made.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 30


async def test_forgotten_address_gets_a_new_channel_and_its_running_calls_end_first(
    pod: tuple[str, subprocess.Popen[str]],
) -> None:
    address, process = pod
    connections = Connections(max_message_bytes=1 << 20)
    try:
        stubs = connections.stubs(address, of_pod=True)
        assert stubs.unary("any/Method") is connections.stubs(address, of_pod=True).unary("any/Method")
        session, _ = connections.http(address, of_pod=True)
        await asyncio.wait_for(stubs.channel.channel_ready(), 30)
        running = asyncio.ensure_future(stubs.unary("any/Method")(b"").code())
        connections.forget(address)
        assert connections.stubs(address, of_pod=True) is not stubs
        assert connections.http(address, of_pod=True)[0] is not session
        assert not running.done(), "the pod may still answer what it has begun"
        process.kill()
        assert await asyncio.wait_for(running, 30) is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(grpc.aio.UsageError):
            stubs.unary("any/Method")(b"")
    finally:
        await connections.close()
    assert session.closed
