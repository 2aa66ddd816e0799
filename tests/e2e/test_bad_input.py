"""A hostile caller of a whole Repertory: whatever is wrong with a request or a checkpoint gets a clear error, and nothing else is lost."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from safetensors.torch import load_file, save_file

from tests.e2e.conftest import API_KEY, HUB_TOKEN, STORE_SECRET, Guarded
from tests.support import tgis_client
from tests.support.checkpoints import tiny_llama
from tests.support.edge import Edge
from wire.fmaas import generation_pb2 as fmaas

MIB = 1 << 20


def _configured(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def _corrupt(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[8:60] = b"\xff" * 52
    (folder / "model.safetensors").write_bytes(content)


def _truncated(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def _incomplete(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _untokenized(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "corrupt": (_corrupt, "not a safetensors file"),
    "truncated": (_truncated, "truncated"),
    "incomplete": (_incomplete, "missing model.layers.0.self_attn.q_proj.weight"),
    "misshapen": (lambda folder: _configured(folder, hidden_size=128), "shape"),
    "unsupported": (lambda folder: _configured(folder, model_type="flurbl", architectures=["Flurbl"]), "flurbl"),
    "bringing-code": (
        lambda folder: _configured(folder, model_type="own", auto_map={"AutoModelForCausalLM": "x.Y"}),
        "own code",
    ),
    "pickled": (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "allow_pickle"),
    "weightless": (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    "unconfigured": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "garbled": (lambda folder: (folder / "config.json").write_text("{not json"), "config.json"),
    "untokenized": (_untokenized, "no tokenizer"),
    "absent": (shutil.rmtree, "no such file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_named_and_harms_no_other(guarded: Guarded, damage: str) -> None:
    spoil, words = DAMAGE[damage]
    folder = guarded.base / "models" / damage
    shutil.copytree(guarded.base / "models" / "ada", folder)
    spoil(folder)
    guarded.edge.register(damage, folder)
    answer = guarded.edge.outcome(damage)
    assert answer.status == 424
    assert words in answer.error
    assert f"model {damage} failed to load" in answer.error
    assert f"{damage}__" not in answer.error
    assert guarded.edge.outcome("ada").status == 200


def test_paths_out_of_bounds_are_refused(guarded: Guarded) -> None:
    models = guarded.base / "models"
    (models / "link").symlink_to("/etc")
    for number, uri in enumerate(("/etc", f"{models}/../..", "file:///etc/passwd", str(models / "link"))):
        answer = guarded.edge.register(f"bounds-{number}", uri)
        assert answer.status == 400
        assert "outside the model roots" in answer.error
    assert guarded.edge.ask("POST", "/admin/v1/fit", {"uri": "/etc"}).status == 400
    assert guarded.edge.register("empty", "").status == 400


def test_model_larger_than_the_disk_cache_is_refused_with_the_sizes(guarded: Guarded) -> None:
    tiny_llama(guarded.base / "models" / "wide", hidden=256, layers=4)
    guarded.edge.register("wide", f"{guarded.web.url}/wide")
    answer = guarded.edge.outcome("wide")
    assert answer.status == 424
    assert "more than the disk cache's budget of 3145728 bytes" in answer.error


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"prompt": "x" * 600}, 400, "maximum context length is 512 tokens, and the prompt has 600"),
        ({"prompt": "x" * 510, "max_tokens": 10}, 400, "520"),
        ({"prompt": ""}, 400, "empty"),
        ({"prompt": [99999]}, 400, "vocabulary"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"max_tokens": 10**30}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_p": 2}, 400, "top_p"),
        ({"n": 0}, 400, "n must be"),
        ({"seed": "a"}, 400, "seed"),
        ({"stop": [1]}, 400, "stop"),
        ({"logit_bias": {"99999": 1}}, 400, "99999"),
        ({"suffix": "a"}, 501, "suffix"),
        ({"best_of": 3}, 501, "best_of"),
        ({"model": "nobody"}, 404, "ada"),
        ({"model": 5}, 400, "model"),
    ],
)
def test_impossible_parameters_are_named(guarded: Guarded, fields: dict[str, object], status: int, words: str) -> None:
    answer = guarded.edge.ask("POST", "/v1/completions", {"model": "ada", "prompt": "a", "max_tokens": 2, **fields})
    assert (answer.status, words in answer.error) == (status, True), answer.text


def test_number_too_wide_for_the_engine_is_refused(guarded: Guarded) -> None:
    """It would end all requests of its step, and at the second time the model."""
    with guarded.edge.stream("ada", max_tokens=100, ignore_eos=True) as shares_the_steps:
        for _ in range(2):
            answer = guarded.edge.complete("ada", temperature=1, top_k=2**40)
            assert answer.status == 200, answer.text
        assert shares_the_steps.read().endswith(b"data: [DONE]\n\n")


def test_token_without_an_embedding_is_refused(guarded: Guarded) -> None:
    folder = guarded.base / "models" / "padded"
    shutil.copytree(guarded.base / "models" / "ada", folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 258, "content": "[PAD]"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    guarded.edge.register("padded", folder)
    assert guarded.edge.outcome("padded").status == 200
    for _ in range(2):
        answer = guarded.edge.complete("padded", prompt="a[PAD]")
        assert (answer.status, "'[PAD]', id 258" in answer.error) == (400, True), answer.text


def test_feature_that_is_not_supported_is_refused_by_name(guarded: Guarded) -> None:
    chat = {"model": "ada", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    for field, value, status in (
        ("response_format", {"type": "structural_tag"}, 501),
        ("adapter_parameters", {"ids": ["a"]}, 501),
        ("adapter_id", "x", 400),
        ("adapter_id", 7, 400),
        ("lora_request", {"name": "x"}, 400),
    ):
        answer = guarded.edge.ask("POST", "/v1/chat/completions", {**chat, field: value})
        assert (answer.status, field in answer.error) == (status, True), answer.text
    for path in ("/v1/rerank", "/v1/images/generations"):
        assert guarded.edge.ask("POST", path, {"model": "ada", "inputs": "a", "input": "a"}).status == 501, path


def test_tokenize_goes_by_name_too(guarded: Guarded) -> None:
    answer = guarded.edge.ask("POST", "/tokenize", {"model": "ada", "prompt": "abc"})
    assert answer.json()["count"] == 3


def test_bodies_that_are_too_long_are_refused_unread(guarded: Guarded) -> None:
    whole = guarded.edge.ask("POST", "/v1/completions", b'{"model":"ada","prompt":"' + b"x" * 100 * MIB + b'"}')
    assert (whole.status, "8388608" in whole.error) == (413, True)
    with socket.create_connection(guarded.edge.address, timeout=20) as connection:
        connection.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {API_KEY}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        answer = b""
        with contextlib.suppress(ConnectionError):  # refused before all of it was sent
            connection.sendall((b"100000\r\n" + b"x" * MIB + b"\r\n") * 100)
            answer = connection.recv(65536)
    assert not answer or b" 413 " in answer.split(b"\r\n")[0]
    assert guarded.edge.outcome("ada").status == 200


def test_unfinished_and_malformed_requests_leave_nothing_behind(guarded: Guarded) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {API_KEY}\r\n"
    for data in (
        b"POST /v1/compl",
        head.encode(),
        (head + 'Content-Length: 500\r\n\r\n{"model"').encode(),
        b"\x16\x03\x01\x02\x00\x01" * 20,
        (head + "Content-Length: -5\r\n\r\n").encode(),
        (head + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n").encode(),
        (head + "X-A: " + "a" * 100_000 + "\r\n\r\n").encode(),
    ):
        with socket.create_connection(guarded.edge.address, timeout=20) as connection:
            try:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(65536)
            except ConnectionError:
                answer = b""
        assert not answer or b" 400 " in answer.split(b"\r\n")[0]
    assert guarded.edge.outcome("ada").status == 200
    _idle(guarded.edge, "ada")


def test_grpc_message_that_cannot_be_read_is_refused_at_once(guarded: Guarded) -> None:
    metadata = (("mm-model-id", "ada"), ("authorization", f"Bearer {API_KEY}"))
    with grpc.insecure_channel(guarded.grpc, options=[("grpc.max_send_message_length", -1)]) as channel:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/fmaas.GenerationService/Generate")
        for message, code in (
            (b"\xff" * 5, grpc.StatusCode.INVALID_ARGUMENT),
            (b"\xff" * 100 * MIB, grpc.StatusCode.RESOURCE_EXHAUSTED),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                call(message, metadata=metadata, timeout=30)
            assert refused.value.code() is code


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"adapter_id": "x"}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"params": {"decoding": {"regex": "a("}}}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"params": {"sampling": {"temperature": -1}}}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"requests": [{"text": "x" * 600}]}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"requests": [{"text": "x" * 4 * MIB}]}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"model": "nobody"}, grpc.StatusCode.NOT_FOUND),
        ({"key": "wrong"}, grpc.StatusCode.UNAUTHENTICATED),
    ],
    ids=lambda value: "",
)
def test_tgis_refusals(guarded: Guarded, change: dict[str, Any], code: grpc.StatusCode) -> None:
    fields = {"requests": [{"text": "a"}], **change}
    model, key = fields.pop("model", "ada"), fields.pop("key", API_KEY)
    request = fmaas.BatchedGenerationRequest(**fields)
    with grpc.insecure_channel(guarded.grpc) as channel, pytest.raises(grpc.RpcError) as refused:
        tgis_client.generate(channel, request, (("mm-model-id", model), ("authorization", f"Bearer {key}")))
    assert refused.value.code() is code


def test_keys_open_everything_but_health(guarded: Guarded) -> None:
    for key in ("", "wrong"):
        edge = Edge(guarded.edge.url, key)
        for path in ("/v1/models", "/admin/v1/models", "/metrics"):
            assert edge.ask("GET", path).status == 401
        assert edge.complete("ada").status == 401
        assert edge.ask("GET", "/readyz").status == 200
    assert Edge(guarded.edge.url).ask("GET", "/v1/models", headers={"Authorization": "Bearer \xe9\xff"}).status == 401
    assert Edge(guarded.edge.url, "another").ask("GET", "/v1/models").status == 200


def test_full_queue_refuses_the_rest_at_once(guarded: Guarded) -> None:
    with ThreadPoolExecutor(24) as callers:
        answers = list(callers.map(lambda _: guarded.edge.complete("ada", max_tokens=300, ignore_eos=True), range(24)))
    counts = Counter(answer.status for answer in answers)
    assert set(counts) == {200, 429}
    assert counts[200] >= 6
    assert "the limit is 4" in next(answer.error for answer in answers if answer.status == 429)
    _idle(guarded.edge, "ada")


def test_request_for_a_slow_load_is_held(guarded: Guarded) -> None:
    shutil.copytree(guarded.base / "models" / "ada", guarded.base / "models" / "slow")
    guarded.edge.register("slow", f"{guarded.web.url}/slow")
    with _dripping(guarded, 1.5), guarded.edge.stream("slow") as response:
        lines = response.read().decode().splitlines()
    comments = [line for line in lines if line.startswith(":")]
    assert any("%" in comment for comment in comments)
    assert lines.index(comments[-1]) < next(index for index, line in enumerate(lines) if line.startswith("data:"))
    assert "data: [DONE]" in lines


def test_past_the_wait_budget_callers_are_told_when_to_return_and_the_load_goes_on(guarded: Guarded) -> None:
    shutil.copytree(guarded.base / "models" / "ada", guarded.base / "models" / "slower")
    guarded.edge.register("slower", f"{guarded.web.url}/slower")
    with _dripping(guarded, 5.0), ThreadPoolExecutor(8) as callers:
        streamed = callers.submit(lambda: guarded.edge.stream("slower").read().decode())
        leaver = guarded.edge.stream("slower")
        leaver.read(1)
        leaver.close()
        answers = [each.result() for each in [callers.submit(guarded.edge.complete, "slower") for _ in range(6)]]
        last = [line for line in streamed.result().splitlines() if line][-1]
    counts = Counter(answer.status for answer in answers)
    assert set(counts) == {429, 503}
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in answers)
    assert "wait budget of 3 s" in json.loads(last.removeprefix("data: "))["error"]["message"]
    _until(lambda: guarded.edge.complete("slower").status == 200, "the load did not go on")
    assert (
        'repertory_mesh_loads_total{model_name="slower",outcome="loaded"} 1.0'
        in guarded.edge.ask("GET", "/metrics").text
    )


def test_secrets_are_refused_in_registrations_and_appear_nowhere(guarded: Guarded) -> None:
    for uri in (
        "https://me:pw-nobody-may-read@example.org/x.gguf",
        "https://example.org/x.gguf?token=pw-nobody-may-read",
    ):
        answer = guarded.edge.register("leak", uri)
        assert (answer.status, "storage_key" in answer.error) == (400, True)
        assert "nobody-may-read" not in answer.error
    guarded.edge.register("stored", "s3://bucket/model", storage_key="mine")
    told = [
        guarded.edge.complete("stored").text,
        guarded.edge.ask("GET", "/admin/v1/models").text,
        guarded.edge.ask("GET", "/metrics").text,
    ]
    files = [path for path in guarded.home.rglob("*") if path.is_file() and path != guarded.home / "run" / "mesh.json"]
    told += [path.read_bytes().decode("latin-1") for path in [*files, guarded.log]]
    for secret in (API_KEY, HUB_TOKEN, STORE_SECRET, "pw-nobody-may-read"):
        assert not any(secret in text for text in told), secret
    # the one file that holds the keys is its owner's
    assert (guarded.home / "run" / "mesh.json").stat().st_mode & 0o077 == 0


def test_serve_names_a_taken_port(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [
            sys.executable,
            "-m",
            "mesh",
            "serve",
            "--home",
            str(tmp_path),
            "--http-listen",
            address,
            "--grpc-listen",
            "127.0.0.1:0",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert f"{address} cannot be listened on" in done.stderr + done.stdout


@contextlib.contextmanager
def _dripping(guarded: Guarded, seconds: float) -> Iterator[None]:
    """Large files take this long while the block runs."""
    guarded.web.drip_s = seconds
    try:
        yield
    finally:
        guarded.web.drip_s = 0.0


def _idle(edge: Edge, name: str) -> None:
    def is_idle() -> bool:
        model = edge.ask("GET", f"/admin/v1/models/{name}").json()
        return not model["running"] and not model["waiting"]

    _until(is_idle, f"{name} still has rows")


def _until(done: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
