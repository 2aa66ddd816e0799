"""Keeps the stubs of the methods that were called on a gRPC channel, for as long as the channel is kept."""

import grpc.aio


class StubbedChannel:
    """A stub costs more than a call. Messages are opaque bytes."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self._unary: dict[str, grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]] = {}
        self._streaming: dict[str, grpc.aio.UnaryStreamMultiCallable[bytes, bytes]] = {}

    def unary(self, method: str) -> "grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]":
        """Return the stub of a method with one message each way."""
        stub = self._unary.get(method)
        if stub is None:
            stub = self._unary[method] = self.channel.unary_unary(f"/{method}")
        return stub

    def streaming(self, method: str) -> "grpc.aio.UnaryStreamMultiCallable[bytes, bytes]":
        """Return the stub of a method whose response may have several messages."""
        stub = self._streaming.get(method)
        if stub is None:
            stub = self._streaming[method] = self.channel.unary_stream(f"/{method}")
        return stub
