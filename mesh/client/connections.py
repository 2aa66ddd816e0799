"""Keeps the gRPC and HTTP connections to the local runtime and to other pods. Each is opened once, and closed when its pod has gone."""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import aiohttp
from grpc import ssl_channel_credentials
from grpc.aio import Channel, insecure_channel, secure_channel

from common.addresses import parse_address
from mesh.access.tls import TlsIdentity
from mesh.client.stubbed_channel import StubbedChannel
from mesh.client.tls_connector import tls_connector

_CONNECT_S = 2.0
_PING_S = 20.0  # a crashed host sends no FIN, so only pings end the requests that it had
_PONG_S = 10.0
_OLD_CHANNEL_S = 600.0
_READ_BUFFER_BYTES = 256 * 1024


class Connections:
    """Addresses are `HOST:PORT` or `unix:PATH`.

    With `tls`, other pods are reached at their `secure_address`, if they have one, and must present a certificate for `peer_name`.
    """

    def __init__(
        self,
        *,
        max_message_bytes: int,
        tls: TlsIdentity | None = None,
        peer_name: str = "",
        secure_address: Callable[[str], str] = lambda _: "",
        ping_s: float = _PING_S,
        pong_s: float = _PONG_S,
    ) -> None:
        self._tls = tls
        self._peer_name = peer_name
        self._secure_address = secure_address
        self._closing: set[asyncio.Task[None]] = set()
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
        self._channels: dict[str, StubbedChannel] = {}
        self._secure_channels: dict[str, tuple[int, StubbedChannel]] = {}
        self._sessions: dict[str, aiohttp.ClientSession] = {}

    def grpc(self, address: str, *, of_pod: bool = False) -> Channel:
        """Return the channel to an address. Only pods are pinged: a foreign runtime might close a connection that pings it."""
        return self.stubs(address, of_pod=of_pod).channel

    def stubs(self, address: str, *, of_pod: bool = False) -> StubbedChannel:
        """Return the channel to an address with its stubs. `of_pod`: as in `grpc`."""
        if of_pod and (secure := self._secure(address)):
            return self._secure_grpc(secure)
        channel = self._channels.get(address)
        if channel is None:
            options = (*self._options, *self._pings) if of_pod else self._options
            channel = self._channels[address] = StubbedChannel(insecure_channel(address, options=options))
        return channel

    def forget(self, address: str) -> None:
        """Close the connections to an address that no pod has any more, once their calls have ended or after ten minutes."""
        secure = self._secure_channels.pop(address, (0, None))[1]
        for channel in (self._channels.pop(address, None), secure):
            if channel is not None:
                self._close_later(channel.channel.close(_OLD_CHANNEL_S))
        for key in (address, f"tls:{address}"):
            if (session := self._sessions.pop(key, None)) is not None:
                self._close_later(_close_idle(session))

    def _close_later(self, work: Coroutine[Any, Any, None]) -> None:
        closing = asyncio.ensure_future(work)
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    def _secure(self, address: str) -> str:
        return self._secure_address(address) if self._tls is not None else ""

    def _secure_grpc(self, address: str) -> StubbedChannel:
        """Return a channel that uses the newest certificate. One with an older certificate is closed once its calls have ended."""
        assert self._tls is not None
        generation, known = self._secure_channels.get(address, (-1, None))
        if known is not None and generation == self._tls.generation:
            return known
        if known is not None:
            self._close_later(known.channel.close(_OLD_CHANNEL_S))
        material = self._tls.material
        credentials = ssl_channel_credentials(material.authority, material.key, material.certificate)
        options = (*self._options, *self._pings, ("grpc.ssl_target_name_override", self._peer_name))
        channel = StubbedChannel(secure_channel(address, credentials, options=options))
        self._secure_channels[address] = self._tls.generation, channel
        return channel

    def http(self, address: str, *, of_pod: bool = False) -> tuple[aiohttp.ClientSession, str]:
        """Return a session and the base of its URLs. Responses are unchanged: no decompression, no redirects, no time limit."""
        if of_pod and self._tls is not None and (secure := self._secure(address)):
            session = self._sessions.get(f"tls:{secure}")
            if session is None:
                connector = tls_connector(secure, self._tls.client_context(), watched_socket)
                session = self._sessions[f"tls:{secure}"] = _session_over(connector)
            return session, f"https://{self._peer_name}:{parse_address(secure).port}"
        session = self._sessions.get(address)
        if session is None:
            session = self._sessions[address] = _session(address)
        return session, "http://runtime" if address.startswith("unix:") else f"http://{address}"

    async def close(self) -> None:
        known = [*self._channels.values(), *(channel for _, channel in self._secure_channels.values())]
        channels = [each.channel for each in known]
        sessions = [*self._sessions.values()]
        self._channels, self._secure_channels, self._sessions = {}, {}, {}
        for closing in self._closing:
            closing.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        await asyncio.gather(*(channel.close() for channel in channels), *(session.close() for session in sessions))


async def _close_idle(session: aiohttp.ClientSession) -> None:
    """Close a session that gets no further requests, after the time that its last ones may take."""
    try:
        await asyncio.sleep(_OLD_CHANNEL_S)
    finally:
        await session.close()


def _session(address: str) -> aiohttp.ClientSession:
    connector: aiohttp.BaseConnector
    if address.startswith("unix:"):
        connector = aiohttp.UnixConnector(path=address.removeprefix("unix:"), limit=0)
    else:
        connector = aiohttp.TCPConnector(limit=0, socket_factory=watched_socket)
    return _session_over(connector)


def _session_over(connector: aiohttp.BaseConnector) -> aiohttp.ClientSession:
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
