"""A web server over a directory, with ranges and ETags, that can cut connections, answer 503, and ask for a header."""

import hashlib
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from tests.support.http_server import HttpServer


class WebServer(HttpServer):
    """`cut_after` bytes of a body the connection is closed, `cuts` times; the first `refusals` requests get 503. A body of more than
    100 kB takes `drip_s`. `log` has what was asked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cut_after = 0
        self.cuts = 0
        self.refusals = 0
        self.drip_s = 0.0
        self.ranges = True
        self.secret = ""
        self.routes: dict[str, Callable[[], tuple[int, dict[str, str], bytes]]] = {}
        self.authorizations: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.log: list[tuple[str, str, str]] = []
        super().__init__(_handler(self))


def _handler(web: WebServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = self.path.split("?")[0]
            web.log.append((self.command, path, self.headers.get("Range", "")))
            web.authorizations.append(self.headers.get("Authorization", ""))
            web.headers.append(dict(self.headers.items()))
            if web.refusals and body:
                web.refusals -= 1
                self.send_error(503)
                return
            if web.secret and self.headers.get("Authorization") != web.secret:
                self.send_error(401)
                return
            headers: dict[str, str] = {}
            if path in web.routes:
                status, headers, data = web.routes[path]()
            else:
                file = web.root / path.lstrip("/")
                if not file.is_file():
                    self.send_error(404)
                    return
                status, data = 200, file.read_bytes()
                headers["ETag"] = f'"{hashlib.md5(data).hexdigest()}"'
            asked = self.headers.get("Range", "")
            if (
                asked
                and web.ranges
                and status == 200
                and self.headers.get("If-Range", headers.get("ETag")) == headers.get("ETag")
            ):
                first, _, last = asked.removeprefix("bytes=").partition("-")
                end = min(int(last) + 1 if last else len(data), len(data))
                headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(data)}"
                status, data = 206, data[int(first) : end]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if not body:
                return
            if web.cuts and len(data) > web.cut_after:
                web.cuts -= 1
                self.wfile.write(data[: web.cut_after])
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
                return
            if web.drip_s and len(data) > 100_000:
                step = -(-len(data) // 50)
                for start in range(0, len(data), step):
                    self.wfile.write(data[start : start + step])
                    time.sleep(web.drip_s / 50)
                return
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 — the base class's name
            pass

    return Handler
