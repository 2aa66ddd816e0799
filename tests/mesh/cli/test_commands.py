"""The command line's verbs against a real pod, as a person or a script calls them: what is printed, and the exit status."""

import asyncio
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mesh.cli.main import VERBS, main
from tests.support.pods import RunningPod, running_pod
from tests.support.waiting import until_async
from wire.mmesh import model_mesh_pb2 as mm
from wire.repertory import runtime_pb2 as state_pb


@pytest.fixture
async def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RunningPod]:
    async with running_pod(tmp_path / "pod") as running:
        monkeypatch.setenv("REPERTORY_SERVER", f"http://127.0.0.1:{running.pod.http.port}")
        yield running


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> "Say":
    return Say(capsys)


class Say:
    """`await say("ps")`: exit status, stdout and stderr."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    async def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self._capsys.readouterr()
        try:
            status = await asyncio.to_thread(main, arguments)
        except SystemExit as error:
            status = int(error.code or 0)
        said = self._capsys.readouterr()
        return status, said.out, said.err


async def test_alias_is_listed_apart_from_its_model_and_deleted_alone(pod: RunningPod, say: Say) -> None:
    assert (await say("register", "ada", "/ada"))[0] == 0
    assert await say("alias", "prod", "ada") == (0, "prod → ada\n", "")
    rows = [line.split() for line in (await say("list"))[1].splitlines()]
    assert next(row for row in rows if row[0] == "prod")[-1] == "ada"
    assert ["alias", "of", "ada"] in [line.split() for line in (await say("show", "prod"))[1].splitlines()]
    listed = {model["name"]: model for model in json.loads((await say("list", "--json"))[1])}
    assert (listed["prod"]["alias_of"], listed["ada"]["alias_of"]) == ("ada", "")
    for name in ("ada", "prod", "nobody"):
        status, _, error = await say("alias", name, name)
        assert (status, f"alias {name}: the target must be another name" in error) == (1, True)
    status, _, error = await say("alias", "ada", "--delete")
    assert (status, error) == (1, "repertory: alias 'ada' not found: it is a registered model\n")
    assert (await say("alias", "prod", "--delete"))[0] == 0
    assert [model["name"] for model in json.loads((await say("list", "--json"))[1])] == ["ada"]
    assert "there is no such name" in (await say("alias", "prod", "--delete"))[2]


async def test_load_reports_a_cut_context(pod: RunningPod, say: Say) -> None:
    pod.runtime.switches.context = (1680, 4096)
    cut = "ada is loaded, with a context of 1,680 tokens, cut from 4,096 to fit the device memory\n"
    assert (await say("register", "ada", "/ada", "--load"))[:2] == (0, cut)
    assert (await say("load", "ada"))[:2] == (0, cut)
    assert "1,680 tokens, cut from 4,096" in " ".join((await say("show", "ada"))[1].split())


async def test_stop_reports_the_requests_that_it_waits_for(pod: RunningPod, say: Say) -> None:
    assert (await say("register", "ada", "/ada", "--load"))[0] == 0
    pod.runtime.switches.sequences = 2
    pod.runtime.tell()
    await until_async(lambda: _running(pod, "ada"))
    status, said, error = await say("stop", "ada")
    assert (status, said) == (0, "ada is unloaded; its registration stays\n")
    assert "waiting for 2 running requests to finish" in error
    assert "`repertory stop --now ada` ends them at once" in error
    assert (await say("load", "ada"))[0] == 0
    assert await say("stop", "--now", "ada") == (0, "ada is unloaded; its registration stays\n", "")


async def _running(pod: RunningPod, name: str) -> bool:
    return bool((await pod.model(name))["running"])


async def test_list_shows_the_last_name_of_a_model_as_no_alias(pod: RunningPod, say: Say) -> None:
    """Whether its first name was removed, or a platform made the vmodel and its target in one call."""
    assert (await say("register", "ada", "/ada"))[0] == 0
    assert (await say("alias", "prod", "ada"))[0] == 0
    assert (await say("rm", "ada"))[0] == 0
    target = mm.SetVModelRequest(
        vModelId="isvc", targetModelId="isvc__isvc-0123456789", modelInfo=mm.ModelInfo(type="llm", path="/m")
    )
    target.autoDeleteTargetModel = True
    await pod.management.setVModel(target)
    await pod.register("plain")
    await pod.management.setVModel(mm.SetVModelRequest(vModelId="other", targetModelId="plain"))
    listed = {model["name"]: model["alias_of"] for model in json.loads((await say("list", "--json"))[1])}
    assert listed == {"isvc": "", "other": "plain", "plain": "", "prod": ""}


async def test_register_refuses_a_relative_path_that_does_not_exist(pod: RunningPod, say: Say) -> None:
    status, _, error = await say("register", "q", "Qwen/Qwen3-0.6B")
    assert status == 2
    assert "hf://Qwen/Qwen3-0.6B" in error
    assert (await say("list"))[1].startswith("no models are registered")
    # a path of the server's own machine may well lead nowhere here
    assert (await say("register", "q", "/on/the/server"))[0] == 0
    # nor is a path in a bucket one
    assert (await say("register", "r", "models/r", "--storage-key", "store"))[0] == 0
    assert (await say("register", "r", "tests", "--storage-param", "bucket=b"))[0] == 0
    assert json.loads((await say("show", "r", "--json"))[1])["uri"] == "tests"
    assert (await say("register", "r", "./tests", "--storage-param", "bucket=b"))[0] == 0
    assert json.loads((await say("show", "r", "--json"))[1])["uri"] == str(Path("tests").absolute())


async def test_register_reports_new_replaced_and_unchanged_names(pod: RunningPod, say: Say) -> None:
    assert (await say("register", "q", "/q"))[1] == "q is registered (new)\n"
    assert (await say("register", "q", "/q"))[1] == "q is registered already, with the same files and settings\n"
    assert (await say("register", "q", "/r"))[1] == "q is replaced (it was /q)\n"
    assert (await say("load", "q"))[0] == 0
    pod.runtime.switches.load_s = 30.0
    assert (await say("register", "q", "/s"))[1] == "q is replaced: /r answers until /s is loaded\n"


async def test_register_shows_what_the_weights_take(pod: RunningPod, say: Say) -> None:
    assert "q: 9.5 MiB of weights; budget 95 MiB" in (await say("register", "q", "/q"))[2]
    pod.runtime.switches.size_bytes["/big"] = 200_000_000
    assert "warning: big cannot be loaded here: too large" in (await say("register", "big", "/big"))[2]


async def test_register_warns_of_files_that_cannot_be_loaded(pod: RunningPod, say: Say) -> None:
    pod.runtime.switches.unreadable["/sql"] = "/sql is a LoRA adapter"
    status, out, note = await say("register", "sql", "/sql")
    assert (status, out, note) == (
        0,
        "sql is registered (new)\n",
        "warning: sql cannot be loaded: /sql is a LoRA adapter\n",
    )


async def test_rm_of_a_base_names_its_adapters(pod: RunningPod, say: Say) -> None:
    for arguments in (("base", "/base"), ("other", "/other"), ("sql", "/sql", "--adapter-of", "base")):
        assert (await say("register", *arguments))[0] == 0
    assert (await say("rm", "other"))[2] == ""
    assert "sql cannot be loaded until base is registered again" in (await say("rm", "base"))[2]


async def test_register_says_what_a_gguf_file_takes_before_it_is_registered(
    pod: RunningPod, say: Say, tmp_path: Path
) -> None:
    pod.runtime.switches.unpacking["/q.gguf"] = {
        "unpacked_blocks": "Q4_K",
        "stored_bytes": 5 << 20,
        "weight_bytes": 16 << 20,
        "nf4_weight_bytes": 6 << 20,
    }
    sentence = (
        "q: 5.0 MiB of Q4_K blocks are unpacked to 16 MiB when the model is loaded; --quantize nf4 takes 6.0 MiB\n"
    )
    assert (await say("register", "q", "/q.gguf"))[2].startswith(sentence)
    assert "5.0 MiB of Q4_K blocks, which are unpacked; as nf4 6.0 MiB" in (await say("fit", "/q.gguf"))[1]
    pod.runtime.switches.unpacking["/q4_0.gguf"] = {
        **pod.runtime.switches.unpacking["/q.gguf"],
        "unpacked_blocks": "Q4_0",
        "kept_weight_bytes": 7 << 20,
    }
    note = (await say("register", "k", "/q4_0.gguf"))[2]
    assert "unpacked to 16 MiB when the model is loaded; --gguf-blocks keep takes 7.0 MiB and is slower\n" in note
    assert "as nf4 6.0 MiB; kept 7.0 MiB" in (await say("fit", "/q4_0.gguf"))[1]
    answer = await pod.name("r", "/q.gguf")
    assert (answer["fit"]["unpacked_blocks"], answer["fit"]["weight_bytes"]) == ("Q4_K", 16 << 20)
    assert (await pod.model("r"))["fit"] is None
    file = tmp_path / "models.yaml"
    file.write_text("models: {s: /q.gguf}\n")
    assert (await say("register", "-f", str(file)))[2] == sentence.replace("q:", "s:", 1)


async def test_fit_takes_a_name_before_a_file_of_that_name(
    pod: RunningPod, say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").touch()
    status, _, error = await say("fit", "m.gguf", "--adapter-of", "nobody")
    assert (status, "'nobody' is not registered" in error, len(pod.runtime.fits)) == (1, True, 0)
    assert (await say("fit", "m.gguf"))[0] == 0
    assert pod.runtime.fits[-1].model_path == str(tmp_path / "m.gguf")
    await pod.name("m.gguf", "/elsewhere")
    assert (await say("fit", "m.gguf"))[0] == 0
    assert pod.runtime.fits[-1].model_path == "/elsewhere"
    status, _, error = await say("fit", "nobody")
    assert (status, "model not found" in error) == (1, True)


async def test_ps_refuses_a_state_that_does_not_exist(say: Say) -> None:
    status, _, error = await say("ps", "--state", "frozen")
    assert status == 2
    assert "'quarantined', 'unloaded')" in error


async def test_register_shows_the_size_even_if_the_registration_fails(pod: RunningPod, say: Say) -> None:
    """The size comes first, so that a person can change the settings before anything is registered."""
    status, out, note = await say("register", "no spaces", "/q")
    assert (status, out) == (1, "")
    assert note.startswith("no spaces: 9.5 MiB of weights; budget 95 MiB\n")


async def test_register_refuses_at_once_what_the_runtime_can_never_load(pod: RunningPod, say: Say) -> None:
    pod.runtime.switches.invalid["/q"] = "path '/q' is outside the model roots"
    status, _, error = await say("register", "q", "/q")
    assert (status, error) == (1, "repertory: path '/q' is outside the model roots\n")
    assert json.loads((await say("list", "--json"))[1]) == []


async def test_register_a_file_registers_all_of_it_or_nothing(pod: RunningPod, say: Say, tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text("models: {ada: {uri: /ada, load: true}, bob: /bob}\naliases: {prod: ada}\n")
    status, out, _ = await say("register", "-f", str(file))
    assert (status, out) == (0, "ada is registered (new); its load has begun\nbob is registered (new)\nprod → ada\n")
    file.write_text("models: {cyd: /cyd, ada: {uri: /ada, quantize: nf5}}\n")
    status, _, error = await say("register", "-f", str(file))
    assert status == 2
    assert "quantize is 'nf5'" in error
    assert [model["name"] for model in json.loads((await say("list", "--json"))[1])] == ["ada", "bob", "prod"]


async def test_register_needs_a_name_and_a_uri_or_a_file(say: Say) -> None:
    assert (await say("register", "q"))[::2] == (2, "repertory: register: give a name and a URI, or --file FILE\n")


async def test_rm_files_drops_the_files_that_no_other_name_needs(pod: RunningPod, say: Say) -> None:
    pod.runtime.files = [
        state_pb.CachedFiles(key="pulled-a", kind="pulled", uri="/shared", size_bytes=1 << 20),
        state_pb.CachedFiles(key="packed-b", kind="packed", uri="/shared", size_bytes=1 << 20, in_use=True),
    ]
    for name in ("one", "two"):
        assert (await say("register", name, "/shared"))[0] == 0
    listed = json.loads((await say("cache", "--json"))[1])["entries"]
    assert {entry["key"]: entry["names"] for entry in listed} == {
        "pulled-a": ["one", "two"],
        "packed-b": ["one", "two"],
    }
    status, out, note = await say("rm", "one", "--files")
    assert (status, out, note) == (0, "one is removed\n", "its files stay, because two has the same source\n")
    _, _, note = await say("rm", "two", "--files")
    assert note == "1.0 MiB of files dropped; 1 of them are in use and stay\n"
    assert (await say("cache", "--prune"))[1] == "0 B freed\n"


async def test_cache_of_a_foreign_runtime_is_refused(tmp_path: Path, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_pod(tmp_path / "foreign", foreign=True) as running:
        monkeypatch.setenv("REPERTORY_SERVER", f"http://127.0.0.1:{running.pod.http.port}")
        status, _, error = await say("cache")
    assert (status, error) == (1, "repertory: this runtime has no disk cache that can be listed\n")


async def test_register_refuses_a_secret_without_showing_it(pod: RunningPod, say: Say) -> None:
    for arguments in (("https://user:word@example.com/m",), ("/q", "--storage-param", "hf_token=word")):
        status, _, error = await say("register", "q", *arguments)
        assert status == 1
        assert "repertory: model q: " in error
        assert "word" not in error.replace("password", "")


async def test_register_refuses_a_context_of_zero_tokens(pod: RunningPod, say: Say) -> None:
    status, _, error = await say("register", "q", "/q", "--max-model-len", "0")
    assert status == 1
    assert "max_model_len" in error


async def test_fit_of_a_name_merges_the_given_settings(pod: RunningPod, say: Say) -> None:
    assert (await say("register", "q", "/q", "--dtype", "float32"))[0] == 0
    status, told, error = await say("fit", "q", "--quantize", "nf4", "--double-quant", "--json")
    assert (status, error) == (0, "")
    assert json.loads(told)["fits"] is True
    key = json.loads(pod.runtime.fits[-1].model_key)
    assert {name: key[name] for name in ("quantize", "double_quant", "dtype")} == {
        "quantize": "nf4",
        "double_quant": True,
        "dtype": "float32",
    }


async def test_run_json_prints_the_response_of_the_api(pod: RunningPod, say: Say) -> None:
    assert (await say("register", "q", "/q"))[0] == 0
    status, told, _ = await say("run", "q", "hello", "--max-tokens", "3", "--json")
    assert status == 0
    assert json.loads(told)["path"] == "/v1/chat/completions"
    assert pod.runtime.bodies[-1]["max_tokens"] == 3


async def test_run_refuses_an_empty_prompt_without_a_terminal(
    pod: RunningPod, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    status, told, error = await say("run", "q")
    assert (status, told) == (2, "")
    assert "the prompt is empty" in error


async def test_usage_error_shows_the_usage_of_the_verb(say: Say) -> None:
    status, _, error = await say("ps", "--colour")
    assert status == 2
    assert error.startswith("usage: repertory ps ")


async def test_options_before_the_verb_belong_to_it(pod: RunningPod, say: Say) -> None:
    assert (await say("register", "ada", "/ada"))[0] == 0
    server = os.environ["REPERTORY_SERVER"]
    status, out, _ = await say("--json", "--server", server, "list", "ad*")
    assert (status, [model["name"] for model in json.loads(out)]) == (0, ["ada"])
    status, _, error = await say("--colour", "ps")
    assert status == 2
    assert error.startswith("usage: repertory ps ")


async def test_ps_lists_what_is_loaded_and_list_everything(pod: RunningPod, say: Say) -> None:
    assert (await say("register", "ada", "/ada", "--load"))[0] == 0
    assert (await say("register", "bob", "/bob"))[0] == 0
    status, out, hint = await say("ps")
    assert status == 0
    assert ("ada" in out, "bob" in out) == (True, False)
    assert hint == "1 more registered name is not loaded; `repertory list` shows all\n"
    assert "bob" in (await say("list"))[1]
    assert "bob" in (await say("ps", "--all"))[1]
    named = json.loads((await say("list", "--state", "unloaded", "--json"))[1])
    assert [model["name"] for model in named] == ["bob"]
    on_pod = json.loads((await say("list", "--pod", pod.pod.instance_id, "--json"))[1])
    assert [model["name"] for model in on_pod] == ["ada"]


async def test_pods_lists_the_pod_with_its_addresses(pod: RunningPod, say: Say) -> None:
    status, out, _ = await say("pods", "--json")
    assert status == 0
    assert [found["instance_id"] for found in json.loads(out)] == [pod.pod.instance_id]
    assert pod.pod.instance_id in (await say("pods"))[1]


async def test_run_of_an_unknown_name_shows_the_nearest_names_first(pod: RunningPod, say: Say) -> None:
    for name in ("alpha", "smollm-chat", "zeta"):
        assert (await say("register", name, f"/{name}"))[0] == 0
    status, _, error = await say("run", "SmolLM-chta", "hello")
    assert status == 1
    assert "served here: smollm-chat, alpha, zeta" in error


@pytest.mark.parametrize("server", ["http://127.0.0.1:abc", "http://[::1", "ftp://x", "http://"])
async def test_server_option_refuses_what_is_no_address(server: str, say: Say) -> None:
    status, _, error = await say("ps", "--server", server)
    assert (status, error) == (2, f"repertory: server {server!r} is not an http:// or https:// address\n")


@contextmanager
def answering(*answers: bytes) -> Iterator[str]:
    """A server that gives each connection the next of these, and hangs up."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for answer in answers:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)  # there may be no client, if a test fails
    thread.start()
    with listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


EVENT = b'data: {"choices":[{"delta":{"content":"half an ans"}}]}\n\n'
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


MODEL = b'HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n{"name":"m"}'


async def test_ps_reports_an_answer_that_is_not_repertorys(say: Say) -> None:
    with answering(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n<br>") as server:
        status, _, error = await say("ps", "--server", server)
    assert (status, error) == (1, f"repertory: what answers at {server} is not Repertory: its answer cannot be read\n")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"\x00\x00\x12\x04gRPC\r\n\r\n", "does not speak HTTP"),
        (STREAM + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(EVENT), EVENT), "broke off"),
        (STREAM + b"\r\n" + EVENT, "broke off"),
    ],
)
async def test_run_reports_a_stream_that_breaks_off(answer: bytes, words: str, say: Say) -> None:
    with answering(MODEL, answer) as server:
        status, told, error = await say("run", "m", "hello", "--server", server)
    assert status == 1
    assert words in error
    assert told in ("", "half an ans\n")
    assert "Traceback" not in error


async def test_ps_reports_an_answer_that_breaks_off(say: Say) -> None:
    with answering(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{") as server:
        status, _, error = await say("ps", "--server", server)
    assert status == 1
    assert "broke off" in error


async def test_output_on_a_pipe_is_not_folded(pod: RunningPod, say: Say) -> None:
    path = "/a" + "/folder" * 60
    assert (await say("register", "n" * 150, path))[0] == 0
    assert path in (await say("show", "n" * 150))[1]
    assert f"{'n' * 150}  not loaded" in (await say("list"))[1]
    assert path in (await say("fit", path))[1]


async def test_json_fields_are_those_of_the_documentation(pod: RunningPod, say: Say) -> None:
    """A script reads them: `docs/api-mesh.md` names each, and nothing else."""
    assert (await say("register", "q", "/q"))[0] == 0
    told = json.loads((await say("load", "q", "--json"))[1])
    page = (Path(__file__).resolve().parents[3] / "docs" / "api-mesh.md").read_text()
    table = page.split("with `--json` (")[1].split("| --- | --- |\n")[1].split("\n\n")[0]
    fields = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert fields == set(told)
    of_a_copy = page.split("Fields of a copy, ")[1].split("\n\n")[1]
    assert set(re.findall(r"`([a-z_]+)`", of_a_copy)) == set(told["copies"][0])


async def test_list_reports_an_output_that_cannot_be_written(pod: RunningPod) -> None:
    """A full disk is one line, a reader that has gone none; a terminal without Unicode gets what it can show."""
    # as people have it: what is buffered is written, and fails, at the end
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}

    async def ps(stdout: int, **environment: str) -> tuple[int | None, str, str]:
        command = [sys.executable, "-m", "mesh", "list"]
        listing = await asyncio.create_subprocess_exec(
            *command,
            stdout=stdout,
            stderr=subprocess.PIPE,
            env=buffered | {"REPERTORY_SERVER": f"http://127.0.0.1:{pod.pod.http.port}"} | environment,
        )
        told, error = await listing.communicate()
        return listing.returncode, (told or b"").decode("ascii", "strict"), error.decode()

    await pod.name("naïve", "/n")
    full = os.open("/dev/full", os.O_WRONLY)
    status, _, error = await ps(full)
    os.close(full)
    assert status == 1
    assert error == "repertory: [Errno 28] No space left on device\n"
    reader, writer = os.pipe()
    os.close(reader)
    status, _, error = await ps(writer)
    os.close(writer)
    assert status in (1, 141)  # rich's choice, and ours
    assert error == ""
    status, told, error = await ps(subprocess.PIPE, PYTHONIOENCODING="ascii")
    assert (status, error) == (0, "")
    assert "na?ve" in told


def test_verbs_are_those_of_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    offered = set(re.findall(r"^    ([a-z-]+)(?: \(([a-z, ]+)\))?", capsys.readouterr().out, re.MULTILINE))
    names = {name for verb, aliases in offered for name in (verb, *filter(None, aliases.split(", ")))}
    assert names == VERBS
