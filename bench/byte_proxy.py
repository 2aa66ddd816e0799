"""A minimal proxy that copies bytes between connections without parsing: `python -m bench.byte_proxy PORT SOCKET …`"""

import asyncio
import sys

import uvloop

_CHUNK = 65536


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


async def _serve(ports: list[tuple[int, str]]) -> None:
    async def listen(port: int, path: str) -> asyncio.Server:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            onward_reader, onward_writer = await asyncio.open_unix_connection(path)
            await asyncio.gather(_pipe(reader, onward_writer), _pipe(onward_reader, writer))

        return await asyncio.start_server(connected, "127.0.0.1", port)

    servers = [await listen(port, path) for port, path in ports]
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    words = sys.argv[1:]
    uvloop.run(_serve([(int(port), path) for port, path in zip(words[::2], words[1::2], strict=True)]))
