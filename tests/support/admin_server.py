"""A stand-in for the mesh's HTTP port with fixed models, for tests of what the command line prints."""

import json
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote

import msgspec

from common.model_fit import ModelFit
from common.model_state import CopyState, Tier
from common.units import GIB, MIB
from mesh.client.admin import CacheEntry, CacheListing, Copy, Dropped, Model, Models, Pod, PodCache, Pods
from tests.support.http_server import HttpServer

Answer = tuple[int, bytes]


class AdminServer(HttpServer):
    """Answers the routes of `mesh.client.admin` from `models` and `pods`. `requests` lists each method, path and body.

    A chat is answered with the words of `words`, one event each.
    """

    def __init__(self, models: list[Model], pods: list[Pod] | None = None) -> None:
        self.models = {model.name: model for model in models}
        self.pods = pods or []
        self.fit = ModelFit(True)
        self.cache = CacheListing()
        self.words = ["The ", "capital ", "is ", "Paris."]
        self.pause_s = 0.0
        self.requests: list[tuple[str, str, dict[str, object]]] = []
        super().__init__(_handler(self))

    def asked(self, path: str) -> list[dict[str, object]]:
        """Return the bodies of the requests to a path."""
        return [body for _, asked, body in self.requests if asked == path]

    def answer(self, method: str, path: str, body: dict[str, object]) -> Answer:
        if path == "/admin/v1/pods":
            return 200, msgspec.json.encode(Pods(self.pods))
        if path == "/admin/v1/cache":
            return 200, msgspec.json.encode(self.cache)
        if path == "/admin/v1/cache/drop":
            keys = body["keys"]
            assert isinstance(keys, list)
            dropped = [entry for entry in self.cache.entries if entry.key in keys]
            return 200, msgspec.json.encode(Dropped(sum(entry.size_bytes for entry in dropped)))
        if path == "/admin/v1/fit":
            return 200, msgspec.json.encode(self.gguf_fit() if "GGUF" in str(body.get("uri")) else self.fit)
        if path in ("/models/load", "/models/unload"):
            return self._change(str(body["model"]), "loaded" if path.endswith("/load") else "")
        if path.startswith("/admin/v1/aliases/"):
            return 204, b""
        if path == "/admin/v1/models" and method == "GET":
            return 200, msgspec.json.encode(Models(list(self.models.values())))
        if path == "/admin/v1/models":
            model = Model(str(body["name"]), f"{body['name']}__0123456789", str(body["uri"]), "llm")
            self.models.setdefault(model.name, model)
            return 200, msgspec.json.encode(self.models[model.name])
        name = unquote(path.removeprefix("/admin/v1/models/"))
        if name not in self.models:
            return 404, _error(f"model not found: {name!r}; served here: {', '.join(self.models)}")
        if method == "DELETE":
            del self.models[name]
            return 204, b""
        return 200, msgspec.json.encode(self.models[name])

    def gguf_fit(self) -> ModelFit:
        """Return `fit` as that of a file of 4-bit blocks."""
        return msgspec.structs.replace(
            self.fit,
            weight_bytes=15 * GIB,
            quantization="none",
            architecture="llama (GGUF)",
            unpacked_blocks="Q4_K",
            stored_bytes=4_700_000_000,
            nf4_weight_bytes=5 * GIB,
        )

    def _change(self, name: str, state: str) -> Answer:
        if name not in self.models:
            return 404, _error(f"model not found: {name!r}; served here: {', '.join(self.models)}")
        status = "LOADED" if state else "NOT_LOADED"
        self.models[name] = msgspec.structs.replace(self.models[name], state=state, status=status)
        return 200, b'{"success": true}'


def _error(message: str) -> bytes:
    return json.dumps({"error": {"message": message}}).encode()


def _handler(server: AdminServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._serve()

        def do_POST(self) -> None:
            self._serve()

        def do_PUT(self) -> None:
            self._serve()

        def do_DELETE(self) -> None:
            self._serve()

        def _serve(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or b"{}")
            server.requests.append((self.command, self.path, body))
            if self.path == "/v1/chat/completions":
                self._chat(body)
                return
            status, answer = server.answer(self.command, self.path, body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def _chat(self, body: dict[str, object]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            try:
                for word in server.words:
                    self._event({"choices": [{"delta": {"content": word}}]})
                    time.sleep(server.pause_s)
                if isinstance(options := body.get("stream_options"), dict) and options.get("include_usage"):
                    usage = {"prompt_tokens": 12, "completion_tokens": len(server.words)}
                    self._event({"choices": [], "usage": usage})
                self.wfile.write(b"data: [DONE]\n\n")
            except ConnectionError:
                return

        def _event(self, event: dict[str, object]) -> None:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            pass

    return Handler


def sample_models(now_ms: Callable[[], int] = lambda: int(time.time() * 1000)) -> list[Model]:
    """Return models in each state that a listing shows, with long and short names, on two pods."""
    now = now_ms()
    resident = Copy(
        instance_id="gpu-a",
        status="LOADED",
        state=CopyState.LOADED,
        tier=Tier.DEVICE,
        weight_bytes=5 * GIB,
        device_bytes=9 * GIB,
        quantization="nf4",
        dtype="bfloat16",
        architecture="LlamaForCausalLM",
        path="fused",
        max_model_len=131072,
    )
    host = msgspec.structs.replace(resident, instance_id="gpu-b", tier=Tier.HOST, device_bytes=0)
    packing = Copy(instance_id="gpu-b", status="LOADING", state=CopyState.PACKING, tier=Tier.UNKNOWN, progress=0.42)
    failed = Copy(
        instance_id="gpu-a", status="LOADING_FAILED", state=CopyState.FAILED, tier=Tier.UNKNOWN, error="no such file"
    )
    return [
        Model(
            "meta-llama/Llama-3.1-8B-Instruct-for-customer-support",
            "meta-llama/Llama-3.1-8B-Instruct-for-customer-support__0123456789",
            "hf://meta-llama/Llama-3.1-8B-Instruct@0e9e39f249a16976918f6564b8830bc894c89659",
            "llm",
            {
                "quantize": "nf4",
                "sampling": {"temperature": 0.6, "top_p": 0.9},
                "chat_template": "{{ messages }} " * 12,
            },
            "LOADED",
            "loaded",
            "device",
            5 * GIB,
            9 * GIB,
            "nf4",
            [resident, host],
            now - 185_000,
            running=3,
            waiting=12,
            aliases=["prod"],
        ),
        Model(
            "prod",
            "meta-llama/Llama-3.1-8B-Instruct-for-customer-support__0123456789",
            "hf://meta-llama/Llama-3.1-8B-Instruct",
            "llm",
            {},
            "LOADED",
            "loaded",
            "device",
            5 * GIB,
            9 * GIB,
            "nf4",
            [resident],
            now - 185_000,
            alias_of="meta-llama/Llama-3.1-8B-Instruct-for-customer-support",
        ),
        Model(
            "smol", "smol__0123456789", "/models/smol", "llm", {}, "LOADING", "packing", copies=[packing], progress=0.42
        ),
        Model(
            "broken",
            "broken__0123456789",
            "/models/broken",
            "llm",
            {},
            "LOADING_FAILED",
            "failed",
            copies=[failed],
            error="FAILED_PRECONDITION: /models/broken: no such file or directory",
        ),
        Model("idle", "idle__0123456789", "s3://bucket/idle", "llm", {}, "NOT_LOADED", weight_bytes=270 * MIB),
    ]


def sample_pods(now_ms: Callable[[], int] = lambda: int(time.time() * 1000)) -> list[Pod]:
    return [
        Pod(
            instance_id=f"gpu-{letter}",
            grpc_address=f"10.0.0.{number}:8033",
            http_address=f"10.0.0.{number}:8080",
            capacity_bytes=200 * GIB,
            used_bytes=5 * GIB,
            device_budget_bytes=120 * GIB,
            device_used_bytes=9 * GIB,
            num_models=2,
            loading=number - 1,
            running=3,
            waiting=0,
            shutting_down=False,
            start_time_ms=now_ms() - 3 * 3_600_000 - 60_000,
            labels=["zone-a"],
        )
        for number, letter in ((1, "a"), (2, "b"))
    ]


def sample_caches(now_ms: Callable[[], int] = lambda: int(time.time() * 1000)) -> CacheListing:
    """Return the caches of three pods, the last of which does not answer."""
    on_a = sample_cache(now_ms)
    entries = [msgspec.structs.replace(entry, pod="gpu-a") for entry in on_a.entries]
    copied = [msgspec.structs.replace(entry, pod="gpu-b") for entry in on_a.entries[:1]]
    pods = [
        PodCache("gpu-a", 200 * GIB, sum(entry.size_bytes for entry in entries)),
        PodCache("gpu-b", 100 * GIB, sum(entry.size_bytes for entry in copied)),
        PodCache("gpu-c", error="it does not answer at 10.0.0.3:8080 (no answer in time)"),
    ]
    return CacheListing(300 * GIB, [*entries, *copied], pods)


def sample_cache(now_ms: Callable[[], int] = lambda: int(time.time() * 1000)) -> CacheListing:
    ago_ms = now_ms() - 2 * 3_600_000 - 60_000
    llama = "hf://meta-llama/Llama-3.1-8B-Instruct"
    return CacheListing(
        200 * GIB,
        [
            CacheEntry("pulled-a", "pulled", llama, 15 * GIB, ago_ms, False, ["llama", "prod"]),
            CacheEntry("packed-b", "packed", llama, 5 * GIB, ago_ms, True, ["llama", "prod"]),
            CacheEntry("pulled-c", "pulled", "s3://bucket/idle", 270 * MIB, ago_ms, False),
        ],
    )
