"""Provides the command line's client of a running mesh: one blocking call per HTTP route."""

import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import msgspec

from common.model_fit import ModelFit
from common.model_state import DeviceFigures, ModelState
from mesh.errors import InvalidRequest, MeshError, Unavailable

T = TypeVar("T")

DEFAULT_SERVER = "http://127.0.0.1:8080"

_BROKEN = (OSError, http.client.HTTPException)


class Copy(ModelState, frozen=True, kw_only=True, omit_defaults=False):
    """One pod's copy in the answer of `/admin/v1/models`: where it is, ModelMesh's status of it, and its state."""

    instance_id: str = ""
    status: str = ""


class Model(msgspec.Struct, frozen=True):
    """A registered name in the answer of `/admin/v1/models`. `moving_to`: the source that the name moves to when it is loaded.

    `alias_of`: the registered name, if this one is an alias. `aliases`: all other names of the same model.
    `fit`: what the model needs, in the answer to its registration, if the runtime could say that in time.
    """

    name: str
    model_id: str = ""
    uri: str = ""
    type: str = ""
    settings: dict[str, Any] = {}
    status: str = ""
    state: str = ""
    tier: str = ""
    weight_bytes: int = 0
    device_bytes: int = 0
    quantization: str = ""
    copies: list[Copy] = []
    last_used_ms: int = 0  # 0 = never
    running: int = 0
    waiting: int = 0
    progress: float = 0.0
    progress_text: str = ""
    error: str = ""
    moving_to: str = ""
    aliases: list[str] = []
    alias_of: str = ""
    fit: ModelFit | None = None


class Models(msgspec.Struct, frozen=True):
    models: list[Model] = []


class Pod(msgspec.Struct, frozen=True):
    """One pod as `repertory pods` shows it; a figure is 0 if the pod has not reported it."""

    instance_id: str
    grpc_address: str
    http_address: str
    capacity_bytes: int
    used_bytes: int
    device_budget_bytes: int
    device_used_bytes: int
    num_models: int
    loading: int
    running: int
    waiting: int
    shutting_down: bool
    start_time_ms: int
    labels: list[str]
    devices: list[DeviceFigures] = []


class Pods(msgspec.Struct, frozen=True):
    pods: list[Pod]


class CacheEntry(msgspec.Struct, frozen=True):
    """Files in one pod's disk cache. `names`: the registered names with this source."""

    key: str
    kind: str
    uri: str
    size_bytes: int
    last_used_ms: int
    in_use: bool
    names: list[str] = []
    pod: str = ""


class PodCache(msgspec.Struct, frozen=True):
    """One pod's cache as a whole. `error`: why it could not be listed, or its files not be dropped."""

    instance_id: str
    budget_bytes: int = 0
    used_bytes: int = 0
    error: str = ""


class CacheListing(msgspec.Struct, frozen=True):
    """The caches of all pods. `budget_bytes`: of those that are listed, together."""

    budget_bytes: int = 0
    entries: list[CacheEntry] = []
    pods: list[PodCache] = []


class Dropped(msgspec.Struct, frozen=True):
    """What was dropped on all pods together. `failed`: the pods on which nothing could be dropped."""

    freed_bytes: int = 0
    num_in_use: int = 0
    failed: list[PodCache] = []


@dataclass(frozen=True, slots=True)
class AdminClient:
    """`server` is a URL such as http://127.0.0.1:8080; `key` a bearer key or empty."""

    server: str
    key: str = ""
    timeout_s: float = 600.0

    def models(self) -> list[Model]:
        return self._decode(self.call("GET", "/admin/v1/models"), Models).models

    def pods(self) -> list[Pod]:
        return self._decode(self.call("GET", "/admin/v1/pods"), Pods).pods

    def model(self, name: str) -> Model:
        return self._decode(self.call("GET", f"/admin/v1/models/{quote(name, safe='')}"), Model)

    def register(self, request: dict[str, object]) -> Model:
        return self._decode(self.call("POST", "/admin/v1/models", request), Model)

    def remove(self, name: str) -> None:
        self.call("DELETE", f"/admin/v1/models/{quote(name, safe='')}")

    def fit(self, request: dict[str, object]) -> ModelFit:
        return self._decode(self.call("POST", "/admin/v1/fit", request), ModelFit)

    def cache(self) -> CacheListing:
        return self._decode(self.call("GET", "/admin/v1/cache"), CacheListing)

    def drop_files(self, keys: list[str]) -> Dropped:
        return self._decode(self.call("POST", "/admin/v1/cache/drop", {"keys": keys}), Dropped)

    def load(self, name: str) -> None:
        self.call("POST", "/models/load", {"model": name})

    def unload(self, name: str, *, now: bool = False) -> None:
        """Unload a model after its running requests, or at once. Returns when it is unloaded."""
        self.call("POST", "/models/unload", {"model": name, "now": now})

    def set_alias(self, alias: str, target: str) -> None:
        self.call("PUT", f"/admin/v1/aliases/{quote(alias, safe='')}", {"target": target})

    def remove_alias(self, alias: str) -> None:
        self.call("DELETE", f"/admin/v1/aliases/{quote(alias, safe='')}")

    def _decode(self, answer: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(answer, type=kind)
        except msgspec.MsgspecError:
            raise Unavailable(f"what answers at {self.server} is not Repertory: its answer cannot be read") from None

    def call(self, method: str, path: str, body: dict[str, object] | None = None) -> bytes:
        """Send a request and return the whole answer. Raises MeshError with the server's message."""
        response, connection = self._send(method, path, body)
        try:
            return response.read()
        except _BROKEN as error:
            raise self._broke_off(error) from None
        finally:
            connection.close()

    def events(self, path: str, body: dict[str, object]) -> Iterator[tuple[str, str]]:
        """Yield server-sent events as ("data", text) and ("comment", text) until [DONE]. Raises Unavailable if the stream ends before."""
        response, connection = self._send("POST", path, body)
        try:
            for raw in response:
                line = raw.decode("utf-8", "replace").rstrip("\r\n")
                if line.startswith(":"):
                    yield "comment", line[1:].strip()
                elif line.startswith("data:"):
                    data = line[5:].strip()
                    if data == "[DONE]":
                        return
                    yield "data", data
        except _BROKEN as error:
            raise self._broke_off(error) from None
        finally:
            connection.close()
        # http.client reports a broken connection as the end of the answer.
        raise self._broke_off(None)

    def _send(
        self, method: str, path: str, body: dict[str, object] | None
    ) -> tuple[http.client.HTTPResponse, http.client.HTTPConnection]:
        connection = self._connection()
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
        except OSError as error:
            connection.close()
            raise Unavailable(
                f"no Repertory answers at {self.server} ({error.strerror or error}); start one with `repertory serve`"
            ) from None
        except http.client.HTTPException as error:
            connection.close()
            raise Unavailable(
                f"the server at {self.server} does not speak HTTP ({type(error).__name__}); use the HTTP port, not the gRPC port"
            ) from None
        if response.status >= 400:
            try:
                text = response.read()
            except _BROKEN:
                text = b""
            connection.close()
            raise _error(response.status, text)
        return response, connection

    def _connection(self) -> http.client.HTTPConnection:
        refusal = InvalidRequest(f"server {self.server!r} is not an http:// or https:// address")
        try:
            parts = urlsplit(self.server if "://" in self.server else f"http://{self.server}")
            port = parts.port
        except ValueError:
            raise refusal from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise refusal
        make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return make(parts.hostname, port, timeout=self.timeout_s)

    def _broke_off(self, error: Exception | None) -> Unavailable:
        return Unavailable(f"the answer of {self.server} broke off" + (f" ({error})" if error and str(error) else ""))


def _error(status: int, body: bytes) -> MeshError:
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = body.decode("utf-8", "replace").strip() or f"HTTP {status}"
    error = MeshError(message)
    error.http_status = status
    return error
