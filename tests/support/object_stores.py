"""One server that speaks the parts of Google Cloud Storage's JSON API and of Azure Blob Storage's REST API that reading a model needs.

Lists in pages, gives ranges, checks who asks, and can cut bodies short, answer 503, and hand out wrong bytes. Knows no client library.
"""

import base64
import hashlib
import hmac
import json
import time
import urllib.parse
from collections.abc import Callable
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import google_crc32c

from tests.support.http_server import HttpServer

ACCOUNT_KEY = base64.b64encode(b"an account's key, of no account").decode()
TOKEN = "ya29.a-token-that-was-fetched"
PAGE = 2


class ObjectStores(HttpServer):
    """`objects` by "bucket/key" (Azure: "account/container/key"). `private`: containers and buckets that want to know who asks.

    `cuts`: so many bodies end in the middle; `refusals`: so many requests get 503; `no_md5`: as objects that were put together of parts.
    `corrupt`: a key whose bytes come out wrong. `log` has method, path and range of each request.
    """

    def __init__(self, identity: Path | None = None) -> None:
        self.objects: dict[str, bytes] = {}
        self.private = False
        self.cuts = 0
        self.refusals = 0
        self.no_md5 = False
        self.corrupt = ""
        self.log: list[tuple[str, str, str]] = []
        self.before_read: Callable[[], None] = lambda: None
        super().__init__(_handler(self), identity)

    def below(self, bucket: str) -> dict[str, bytes]:
        return {
            name.removeprefix(f"{bucket}/"): data
            for name, data in sorted(self.objects.items())
            if name.startswith(f"{bucket}/")
        }

    @property
    def reads(self) -> list[str]:
        return [asked for method, _, asked in self.log if asked]


def generation(data: bytes) -> str:
    return str(int(hashlib.sha256(data).hexdigest()[:12], 16))


def _handler(stores: ObjectStores) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            # the token endpoint: a signed assertion for a token
            body = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            claims = json.loads(base64.urlsafe_b64decode(body["assertion"][0].split(".")[1] + "=="))
            assert claims["iss"].endswith("@models.iam.gserviceaccount.com")
            self.say(
                200,
                json.dumps({"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"}).encode(),
                "application/json",
            )

        def do_GET(self) -> None:
            parts = urllib.parse.urlsplit(self.path)
            query = {name: values[0] for name, values in urllib.parse.parse_qs(parts.query).items()}
            asked = self.headers.get("x-ms-range") or self.headers.get("Range") or ""
            stores.log.append((self.command, urllib.parse.unquote(parts.path), asked))
            if stores.refusals:
                stores.refusals -= 1
                self.say(503, b"busy", "text/plain")
            elif parts.path == "/identity":
                # of a machine: who may ask knows the header
                known = (
                    self.headers.get("X-IDENTITY-HEADER") == "of-this-machine"
                    and query["resource"] == "https://storage.azure.com"
                )
                token = {
                    "access_token": TOKEN,
                    "expires_on": str(int(time.time()) + 3600),
                    "resource": query["resource"],
                    "token_type": "Bearer",
                }
                self.say(200 if known else 400, json.dumps(token if known else {}).encode(), "application/json")
            elif parts.path.startswith(("/storage/v1/b/", "/download/storage/v1/b/")):
                self.google(parts.path.partition("/b/")[2].split("/"), query, asked)
            else:
                self.azure(parts.path, query, asked)

        def google(self, path: list[str], query: dict[str, str], asked: str) -> None:
            bucket = path[0]
            objects = stores.below(bucket)
            if stores.private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                message = f"Anonymous caller does not have storage.objects.list access to {bucket}."
                self.say(401, json.dumps({"error": {"code": 401, "message": message}}).encode(), "application/json")
            elif not objects:
                self.say(
                    404,
                    json.dumps({"error": {"code": 404, "message": "The specified bucket does not exist."}}).encode(),
                    "application/json",
                )
            elif len(path) == 2:
                names = [
                    name
                    for name in objects
                    if name.startswith(query.get("prefix", "")) and name > query.get("pageToken", "")
                ]
                page = {
                    "kind": "storage#objects",
                    "items": [self.described(bucket, name, objects[name]) for name in names[:PAGE]],
                }
                if len(names) > PAGE:
                    page["nextPageToken"] = names[PAGE - 1]
                self.say(200, json.dumps(page).encode(), "application/json")
            else:
                name = urllib.parse.unquote(path[2])
                stores.before_read()
                data = stores.below(bucket)[name]
                if query.get("ifGenerationMatch", generation(data)) != generation(data):
                    self.say(
                        412,
                        b'{"error": {"code": 412, "message": "At least one of the pre-conditions you specified did not hold."}}',
                        "application/json",
                    )
                    return
                self.give(name, data, asked, {"X-Goog-Generation": generation(data)})

        def described(self, bucket: str, name: str, data: bytes) -> dict[str, str]:
            found = {
                "name": name,
                "bucket": bucket,
                "size": str(len(data)),
                "generation": generation(data),
                "crc32c": base64.b64encode(google_crc32c.Checksum(data).digest()).decode(),
            }
            if not stores.no_md5:
                found["md5Hash"] = base64.b64encode(hashlib.md5(data).digest()).decode()
            return found

        def azure(self, path: str, query: dict[str, str], asked: str) -> None:
            account, container, *rest = urllib.parse.unquote(path).strip("/").split("/")
            if stores.private and not self.signed(account, path, query):
                self.refuse(403, "AuthenticationFailed", "Server failed to authenticate the request.")
                return
            objects = stores.below(f"{account}/{container}")
            if not objects:
                self.refuse(404, "ContainerNotFound", "The specified container does not exist.")
            elif query.get("comp") == "list":
                names = [
                    name
                    for name in objects
                    if name.startswith(query.get("prefix", "")) and name > query.get("marker", "")
                ]
                blobs = "".join(self.blob(name, objects[name]) for name in names[:PAGE])
                marker = names[PAGE - 1] if len(names) > PAGE else ""
                text = f'<?xml version="1.0" encoding="utf-8"?><EnumerationResults><Blobs>{blobs}</Blobs><NextMarker>{marker}</NextMarker></EnumerationResults>'
                self.say(200, text.encode(), "application/xml")
            else:
                stores.before_read()
                objects = stores.below(f"{account}/{container}")
                name = "/".join(rest)
                if name not in objects:
                    self.refuse(404, "BlobNotFound", "The specified blob does not exist.")
                    return
                tag = f'"0x{generation(objects[name])}"'
                if self.headers.get("If-Match", tag) != tag:
                    self.refuse(
                        412, "ConditionNotMet", "The condition specified using HTTP conditional header(s) is not met."
                    )
                    return
                self.give(
                    name,
                    objects[name],
                    asked,
                    {"ETag": tag, "x-ms-blob-type": "BlockBlob", "Last-Modified": formatdate(usegmt=True)},
                )

        def blob(self, name: str, data: bytes) -> str:
            md5 = (
                ""
                if stores.no_md5
                else f"<Content-MD5>{base64.b64encode(hashlib.md5(data).digest()).decode()}</Content-MD5>"
            )
            return (
                f"<Blob><Name>{name}</Name><Properties><Last-Modified>{formatdate(usegmt=True)}</Last-Modified><Etag>0x{generation(data)}</Etag>"
                f"<Content-Length>{len(data)}</Content-Length>{md5}<BlobType>BlockBlob</BlobType></Properties></Blob>"
            )

        def signed(self, account: str, path: str, query: dict[str, str]) -> bool:
            """By a signature in the URL, or by Shared Key: the request's method, headers and address, signed with the account's key."""
            if self.headers.get("Authorization") == f"Bearer {TOKEN}":
                return True
            if "sig" in query:
                return query["sig"] == "a+signature="
            plain = ("Content-Encoding", "Content-Language", "Content-Length", "Content-MD5", "Content-Type", "Date")
            conditions = ("If-Modified-Since", "If-Match", "If-None-Match", "If-Unmodified-Since", "Range")
            words = [self.command, *(self.headers.get(name, "") for name in (*plain, *conditions))]
            ours = sorted(
                (name.lower(), value) for name, value in self.headers.items() if name.lower().startswith("x-ms-")
            )
            words += [f"{name}:{value}" for name, value in ours]
            resource = f"/{account}{path}" + "".join(f"\n{name}:{value}" for name, value in sorted(query.items()))
            text = "\n".join([*words, resource])
            digest = hmac.new(base64.b64decode(ACCOUNT_KEY), text.encode(), hashlib.sha256).digest()
            return self.headers.get("Authorization") == f"SharedKey {account}:{base64.b64encode(digest).decode()}"

        def refuse(self, status: int, code: str, message: str) -> None:
            body = f'<?xml version="1.0" encoding="utf-8"?><Error><Code>{code}</Code><Message>{message}\nRequestId:1-2-3</Message></Error>'
            self.say(status, body.encode(), "application/xml", {"x-ms-error-code": code})

        def give(self, name: str, data: bytes, asked: str, headers: dict[str, str]) -> None:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            piece = data[int(first) : int(last) + 1]
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(piece) - 1}/{len(data)}"
            if name == stores.corrupt:
                piece = bytes([piece[0] ^ 1]) + piece[1:]
            cut = stores.cuts > 0 and len(piece) > 1
            stores.cuts -= cut
            self.say(206, piece, "application/octet-stream", headers, sent=len(piece) // 2 if cut else len(piece))

        def say(
            self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None, sent: int = -1
        ) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body if sent < 0 else body[:sent])
            self.close_connection = 0 <= sent < len(body)

        def log_message(self, *_: object) -> None: ...

    return Handler
