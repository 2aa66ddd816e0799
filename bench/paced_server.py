"""A gRPC server whose every call is answered with COUNT messages at a fixed RATE per second: `python -m bench.paced_server ADDRESS RATE COUNT`.

A message that is late does not delay the ones after it.
"""

import asyncio
import sys
import time
from typing import Any

import grpc
import grpc.aio
import uvloop

from bench.edge import MESSAGE


class Paced(grpc.GenericRpcHandler):
    def __init__(self, rate: float, count: int) -> None:
        self._rate = rate
        self._count = count

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return grpc.unary_stream_rpc_method_handler(self._answer)

    async def _answer(self, _: bytes, context: Any) -> None:
        started_s = time.monotonic()
        for number in range(self._count):
            await asyncio.sleep(max(0.0, started_s + number / self._rate - time.monotonic()))
            await context.write(MESSAGE)


async def _serve(address: str, rate: float, count: int) -> None:
    server = grpc.aio.server(options=(("grpc.max_concurrent_streams", 100_000),))
    server.add_generic_rpc_handlers((Paced(rate, count),))
    server.add_insecure_port(address)
    await server.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve(sys.argv[1], float(sys.argv[2]), int(sys.argv[3])))
