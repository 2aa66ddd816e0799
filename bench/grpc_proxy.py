"""A bare grpc.aio proxy: forwards messages and metadata as they are, both ways: `python -m bench.grpc_proxy ADDRESS TARGET`.

It is the least that a proxy in this language and library does. A method whose name ends with `Stream` takes one message and answers with several,
any other one answers with one.
"""

import asyncio
import sys
from typing import Any

import grpc
import grpc.aio
import uvloop

_OF_THE_TRANSPORT = ("user-agent", "content-type", "te")
_OPTIONS = (("grpc.max_concurrent_streams", 100_000),)


class Proxy(grpc.GenericRpcHandler):
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._handlers: dict[str, Any] = {}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        method = str(handler_call_details.method)
        handler = self._handlers.get(method)
        if handler is None:
            make = self._stream if method.endswith("Stream") else self._unary
            handler = self._handlers[method] = make(method)
        return handler

    def _unary(self, method: str) -> Any:
        call: Any = self._channel.unary_unary(method)

        async def forward(message: bytes, context: Any) -> Any:
            onward = call(message, metadata=_passed(context.invocation_metadata()))
            response = await onward
            await _send_headers(onward, context)
            _set_trailers(await onward.trailing_metadata(), context)
            return response

        return grpc.unary_unary_rpc_method_handler(forward)

    def _stream(self, method: str) -> Any:
        call: Any = self._channel.unary_stream(method)

        async def forward(message: bytes, context: Any) -> None:
            onward = call(message, metadata=_passed(context.invocation_metadata()))
            is_first = True
            async for part in onward:
                if is_first:
                    is_first = False
                    await _send_headers(onward, context)
                await context.write(part)
            _set_trailers(await onward.trailing_metadata(), context)

        return grpc.unary_stream_rpc_method_handler(forward)


async def _send_headers(call: Any, context: Any) -> None:
    if headers := _passed(await call.initial_metadata()):
        await context.send_initial_metadata(headers)


def _set_trailers(trailers: Any, context: Any) -> None:
    if passed := tuple(trailers):
        context.set_trailing_metadata(passed)


def _passed(metadata: Any) -> list[tuple[str, str | bytes]]:
    return [pair for pair in metadata if pair[0] not in _OF_THE_TRANSPORT]


async def _serve(address: str, target: str) -> None:
    async with grpc.aio.insecure_channel(target) as channel:
        server = grpc.aio.server(options=_OPTIONS)
        server.add_generic_rpc_handlers((Proxy(channel),))
        server.add_insecure_port(address)
        await server.start()
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve(sys.argv[1], sys.argv[2]))
