"""A web server of the standard library in a thread, on a port of its own: what the stand-ins for stores and sites are made of."""

import ssl
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Log nothing of a client that left, which a test may have made it do."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]  # the library's type is a private union


class HttpServer:
    """Runs from its making until `close`. `url` is where it answers; over TLS with the key and certificate in the file `identity`."""

    def __init__(self, handler: type[BaseHTTPRequestHandler], identity: Path | None = None) -> None:
        handler.disable_nagle_algorithm = (
            True  # an answer's body follows its headers at once, not when they are acknowledged 40 ms later
        )
        self._server = _Server(("127.0.0.1", 0), handler)
        if identity is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(identity)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        # the interval is how long `close` may take
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        self.url = f"http{'s' if identity is not None else ''}://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
