"""Keeps the gRPC and HTTP connections to the local runtime and to other pods. Each is opened once."""

import asyncio
import socket

import aiohttp
import grpc.aio

_CONNECT_S = 2.0
_PING_S = 20.0  # a crashed host sends no FIN, so only pings end the requests that it had
_PONG_S = 10.0
_READ_BUFFER_BYTES = 256 * 1024


class Connections:
    """Addresses are `HOST:PORT` or `unix:PATH`."""

    def __init__(self, *, max_message_bytes: int, ping_s: float = _PING_S, pong_s: float = _PONG_S) -> None:
        self._options: tuple[tuple[str, int], ...] = (
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.max_receive_message_length", max_message_bytes),
            # Reconnect soon to a restarted runtime or pod; gRPC's default waits up to two minutes.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
            ("grpc.enable_retries", 0),
            ("grpc.use_local_subchannel_pool", 1),
        )
        # gRPC waits for a ping's answer for ping_timeout (default one minute); keepalive_timeout alone has no effect.
        self._pings = (
            ("grpc.keepalive_time_ms", round(ping_s * 1000)),
            ("grpc.keepalive_timeout_ms", round(pong_s * 1000)),
            ("grpc.http2.ping_timeout_ms", round(pong_s * 1000)),
            # By default gRPC sends at most two pings without data, which a caller that only receives never sends.
            ("grpc.http2.max_pings_without_data", 0),
        )
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._sessions: dict[str, aiohttp.ClientSession] = {}

    def grpc(self, address: str, *, of_pod: bool = False) -> grpc.aio.Channel:
        """Return the channel to an address. Only pods are pinged: a foreign runtime might close a connection that pings it."""
        channel = self._channels.get(address)
        if channel is None:
            options = (*self._options, *self._pings) if of_pod else self._options
            channel = self._channels[address] = grpc.aio.insecure_channel(address, options=options)
        return channel

    def http(self, address: str) -> tuple[aiohttp.ClientSession, str]:
        """Return a session and the base of its URLs. Responses are unchanged: no decompression, no redirects, no time limit."""
        session = self._sessions.get(address)
        if session is None:
            session = self._sessions[address] = _session(address)
        return session, "http://runtime" if address.startswith("unix:") else f"http://{address}"

    async def close(self) -> None:
        channels, self._channels = self._channels, {}
        sessions, self._sessions = self._sessions, {}
        await asyncio.gather(
            *(channel.close() for channel in channels.values()), *(session.close() for session in sessions.values())
        )


def _session(address: str) -> aiohttp.ClientSession:
    connector: aiohttp.BaseConnector
    if address.startswith("unix:"):
        connector = aiohttp.UnixConnector(path=address.removeprefix("unix:"), limit=0)
    else:
        connector = aiohttp.TCPConnector(limit=0, socket_factory=watched_socket)
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        read_bufsize=_READ_BUFFER_BYTES,
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
    )


def watched_socket(info: aiohttp.AddrInfoType) -> socket.socket:
    """Return a socket with TCP keepalive."""
    family, kind, protocol, _, _ = info
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", round(_PING_S)), ("TCP_KEEPINTVL", round(_PONG_S / 2)), ("TCP_KEEPCNT", 2)):
        if hasattr(socket, option):  # the options exist on Linux
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return made
