"""Connects to an etcd cluster: endpoints, TLS, authentication, and the repetition of calls.

A call is sent only on a connected channel, so that a failure before that is known to have changed nothing. A write
whose answer was lost raises StoreUncertain and is not repeated, because etcd has no request ids.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

import grpc

from common.watched_files import WatchedFiles
from mesh.errors import InvalidRequest, StoreError, StoreRefused, StoreUncertain
from mesh.store.location import EtcdLocation
from wire import etcd_pb2 as pb

logger = logging.getLogger(__name__)


class Message(Protocol):
    def SerializeToString(self) -> bytes: ...  # noqa: N802 - protobuf's name


Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Method(Generic[Answer]):
    """`repeatable`: the method is idempotent, so a call whose answer was lost is repeated."""

    path: str
    parse: Callable[[bytes], Answer]
    repeatable: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Stream(Generic[Answer]):
    call: "grpc.aio.StreamStreamCall[Any, Answer]"
    endpoint: int

    def cancel(self) -> None:
        self.call.cancel()


AUTHENTICATE = Method("/etcdserverpb.Auth/Authenticate", pb.AuthenticateResponse.FromString, repeatable=True)

CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    # gRPC's default back-off of up to two minutes is too slow for a store that restarts.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Notice a peer that vanished without a FIN. etcd refuses pings more often than every 5 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # gRPC's own timeout of a ping's answer, a minute by default
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),
    # A page of a listing holds up to 5,000 records of any size.
    ("grpc.max_receive_message_length", -1),
)

ENDPOINT_TIMEOUT_S = 1.0
RETRY_PAUSE_S = 0.05
FILES_POLL_S = 1.0
OLD_CHANNEL_S = 5.0  # for calls in flight


class EtcdConnection:
    """Keeps one channel per endpoint. One of them is in use; after a failure the next one is.

    `reread` reads the location again; it is called when certificates or other files of the location have changed.
    """

    def __init__(
        self,
        location: EtcdLocation,
        *,
        connect_timeout_s: float,
        call_timeout_s: float,
        reread: Callable[[], EtcdLocation] | None = None,
    ) -> None:
        self._location = location
        self._reread = reread
        self._watched = WatchedFiles(location.files)
        self._following: asyncio.Task[None] | None = None
        self._retired: set[asyncio.Task[None]] = set()
        self._connect_timeout_s = connect_timeout_s
        self._call_timeout_s = call_timeout_s
        self._channels: list[grpc.aio.Channel] = []
        self._streams: set[Any] = set()
        self._current = 0
        self._token = ""
        self._authenticating = asyncio.Lock()
        self.closed = False
        self.is_answering = True

    async def open(self) -> None:
        """Raises StoreError if no endpoint answers within the connect timeout or the user is refused."""
        self._channels = [self._channel(endpoint, self._location) for endpoint in self._location.endpoints]
        await self._ready(asyncio.get_running_loop().time() + self._connect_timeout_s, self._connect_timeout_s)
        if self._location.user:
            await self._authenticate("")
        if self._location.files and self._reread is not None:
            self._following = asyncio.create_task(self._follow_files(self._reread), name="etcd: files")

    async def close(self) -> None:
        self.closed = True
        for task in (self._following, *self._retired):
            if task is not None:
                task.cancel()
        # Not every version of gRPC ends the streams of a closed channel.
        for stream in tuple(self._streams):
            stream.cancel()
        for channel in self._channels:
            await channel.close(None)

    async def call(self, method: Method[Answer], request: Message) -> Answer:
        """Call a unary method. Raises StoreError if nothing was changed, StoreUncertain if a write may have been applied.

        StoreRefused is the StoreError for an answer of etcd that is not one of an outage.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._call_timeout_s
        refreshed = False
        while True:
            channel = await self._ready(deadline, self._call_timeout_s)
            endpoint, token = self._current, self._token
            try:
                answer = await self._send(channel, method, request, deadline - loop.time())
                self.is_answering = True
                return answer
            except grpc.aio.AioRpcError as error:
                if _token_is_stale(error) and self._location.user and not refreshed:
                    refreshed = True
                    await self._authenticate(token)
                    continue
                self._check_open()
                if error.code() not in (
                    grpc.StatusCode.UNAVAILABLE,
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                    grpc.StatusCode.CANCELLED,
                ):
                    raise StoreRefused(
                        f"store: etcd refused {method.path}: {error.code().name}: {error.details()}",
                        status=error.code().name,
                    ) from None
                self._switch_endpoint(endpoint)
                never_sent = error.details() == "etcdserver: no leader"
                if not (method.repeatable or never_sent):
                    raise StoreUncertain(
                        f"store: the answer to {method.path} was lost ({error.code().name}: {error.details()})"
                    ) from None
                if loop.time() + RETRY_PAUSE_S >= deadline:
                    raise StoreError(
                        f"store: etcd did not answer {method.path} within {self._call_timeout_s} s ({error.code().name}: {error.details()})"
                    ) from None
            await asyncio.sleep(RETRY_PAUSE_S)

    async def stream(self, method: Method[Answer]) -> Stream[Answer]:
        """Open a bidirectional stream on a connected channel, for use with `read` and `write`."""
        deadline = asyncio.get_running_loop().time() + self._call_timeout_s
        channel = await self._ready(deadline, self._call_timeout_s)
        opener = channel.stream_stream(method.path, request_serializer=_serialize, response_deserializer=method.parse)
        # With this header, a member without a leader ends the stream instead of sending nothing.
        call: grpc.aio.StreamStreamCall[Any, Answer] = opener(metadata=(*self._metadata(), ("hasleader", "true")))
        self._streams.add(call)
        call.add_done_callback(self._streams.discard)
        return Stream(call, self._current)

    async def read(self, stream: Stream[Answer]) -> Answer:
        """Return the next message. Raises StoreError at the end of the stream."""
        with self._stream_errors(stream):
            answer = await stream.call.read()
        if answer is grpc.aio.EOF:
            self._switch_endpoint(stream.endpoint)
            raise StoreError("store: etcd ended the stream")
        self.is_answering = True
        return cast("Answer", answer)

    async def write(self, stream: Stream[Answer], message: Message) -> None:
        """Raises StoreError if the stream has ended."""
        with self._stream_errors(stream):
            await stream.call.write(message)

    def abandon(self, stream: Stream[Answer]) -> None:
        """Cancel a stream whose endpoint does not answer, and use another endpoint."""
        self._switch_endpoint(stream.endpoint)
        stream.cancel()

    async def reauthenticate(self) -> None:
        """Get a new token if a user is configured."""
        if self._location.user:
            await self._authenticate(self._token)

    def _switch_endpoint(self, endpoint: int) -> None:
        """Use the next endpoint instead of this failed one, unless another call has done so already."""
        self.is_answering = False
        if endpoint == self._current:
            self._current = (endpoint + 1) % len(self._channels)

    async def _send(
        self, channel: grpc.aio.Channel, method: Method[Answer], request: Message, timeout_s: float
    ) -> Answer:
        unary = channel.unary_unary(method.path, request_serializer=_serialize, response_deserializer=method.parse)
        with self._closing_as_store_error():
            answer: Answer = await unary(request, timeout=timeout_s, metadata=self._metadata())
            return answer

    @contextmanager
    def _stream_errors(self, stream: Stream[Answer]) -> Iterator[None]:
        """Turn the three errors with which gRPC reports an ended stream into StoreError."""
        try:
            with self._closing_as_store_error():
                yield
        except grpc.aio.AioRpcError as error:
            self._switch_endpoint(stream.endpoint)
            raise StoreError(f"store: the stream broke: {error.code().name}: {error.details()}") from None
        except (grpc.aio.UsageError, asyncio.InvalidStateError) as error:
            raise StoreError(f"store: the stream broke: {error}") from None

    @contextmanager
    def _closing_as_store_error(self) -> Iterator[None]:
        """Turn the CancelledError of a closed channel or cancelled stream into StoreError, unless the task itself was cancelled."""
        try:
            yield
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and not task.cancelling():
                raise StoreError("store: closed" if self.closed else "store: the stream was cancelled") from None
            raise

    async def _ready(self, deadline: float, budget_s: float) -> grpc.aio.Channel:
        loop = asyncio.get_running_loop()
        failed_in_a_row = 0
        while True:
            self._check_open()
            if not self._channels:
                raise StoreError("store: not open")
            channel = self._channels[self._current]
            timeout_s = deadline - loop.time()
            if len(self._channels) > 1:
                timeout_s = min(timeout_s, ENDPOINT_TIMEOUT_S)
            if await _connected(channel, timeout_s, fail_fast=len(self._channels) > 1):
                return channel
            if loop.time() >= deadline:
                raise StoreError(
                    f"store: no etcd endpoint of {', '.join(self._location.endpoints)} could be reached within {budget_s} s"
                )
            self._switch_endpoint(self._current)
            failed_in_a_row += 1
            if failed_in_a_row % len(self._channels) == 0:
                await asyncio.sleep(RETRY_PAUSE_S)

    async def _authenticate(self, stale: str) -> None:
        """Replace the stale token, once for all calls that found it stale."""
        async with self._authenticating:
            if self._token != stale:
                return
            loop = asyncio.get_running_loop()
            deadline = loop.time() + self._call_timeout_s
            channel = await self._ready(deadline, self._call_timeout_s)
            self._token = ""
            request = pb.AuthenticateRequest(name=self._location.user, password=self._location.password)
            try:
                self._token = (await self._send(channel, AUTHENTICATE, request, deadline - loop.time())).token
            except grpc.aio.AioRpcError as error:
                if error.details() == "etcdserver: authentication is not enabled":
                    logger.info("etcd has authentication switched off; user %r is not used", self._location.user)
                    return
                raise StoreError(f"store: etcd refused user {self._location.user!r}: {error.details()}") from None

    async def _follow_files(self, reread: Callable[[], EtcdLocation]) -> None:
        """Use new channels after the files have changed. Streams move to them when the old ones are closed."""
        is_stale = False
        while True:
            await asyncio.sleep(FILES_POLL_S)
            if not (await asyncio.to_thread(self._watched.changed) or is_stale):
                continue
            try:
                location = await asyncio.to_thread(reread)
                channels = [self._channel(endpoint, location) for endpoint in location.endpoints]
            except (InvalidRequest, ValueError) as error:
                # One of several files may have been replaced before the others.
                if not is_stale:
                    logger.warning("the connection to etcd keeps its certificates: %s", error)
                is_stale = True
                continue
            is_stale = False
            old, self._channels, self._location, self._current = self._channels, channels, location, 0
            for channel in old:
                closing = asyncio.ensure_future(channel.close(OLD_CHANNEL_S))
                self._retired.add(closing)
                closing.add_done_callback(self._retired.discard)
            logger.info("read the files of the etcd connection again")

    def _metadata(self) -> Sequence[tuple[str, str]]:
        return (("token", self._token),) if self._token else ()

    def _channel(self, endpoint: str, where: EtcdLocation) -> grpc.aio.Channel:
        options = list(CHANNEL_OPTIONS)
        if where.override_authority:
            options.append(
                ("grpc.ssl_target_name_override" if where.tls else "grpc.default_authority", where.override_authority)
            )
        if not where.tls:
            return grpc.aio.insecure_channel(endpoint, options=options)
        credentials = grpc.ssl_channel_credentials(where.ca_pem, where.client_key_pem, where.client_cert_pem)
        return grpc.aio.secure_channel(endpoint, credentials, options=options)

    def _check_open(self) -> None:
        if self.closed:
            raise StoreError("store: closed")


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _token_is_stale(error: grpc.aio.AioRpcError) -> bool:
    return error.code() is grpc.StatusCode.UNAUTHENTICATED or (error.details() or "") in (
        "etcdserver: invalid auth token",
        "etcdserver: revision of auth store is old",
        "etcdserver: user name is empty",
    )


async def _connected(channel: grpc.aio.Channel, timeout_s: float, *, fail_fast: bool) -> bool:
    try:
        async with asyncio.timeout(max(timeout_s, 0.0)):
            while True:
                state = channel.get_state(try_to_connect=True)
                if state is grpc.ChannelConnectivity.READY:
                    return True
                failed = state is grpc.ChannelConnectivity.TRANSIENT_FAILURE and fail_fast
                if failed or state is grpc.ChannelConnectivity.SHUTDOWN:
                    return False
                await channel.wait_for_state_change(state)
    except TimeoutError:
        return False
