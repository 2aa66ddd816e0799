"""One machine, from the outside: `repertory serve` as processes, called by the official OpenAI client and by a TGIS client."""

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc
import openai
import psutil
import pytest

from mesh.errors import MeshError
from tests.e2e.conftest import greedy
from tests.support import stack, tgis_client
from tests.support.checkpoints import tiny_llama
from tests.support.waiting import wait_until
from wire.fmaas import generation_pb2 as fmaas

pytestmark = pytest.mark.slow

PROMPT = "The company keeps many plays ready"


def client_of(served: stack.Stack, retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=retries, timeout=120)


def stream_text(served: stack.Stack, model: str, prompt: str, max_tokens: int) -> str:
    parts = client_of(served).completions.create(
        model=model, prompt=prompt, max_tokens=max_tokens, temperature=0, stream=True
    )
    return "".join(part.choices[0].text for part in parts if part.choices)


def engine_process(served: stack.Stack) -> psutil.Process:
    for child in psutil.Process(served.pid).children(recursive=True):
        if "runtime.engine" in child.cmdline():
            return child
    raise AssertionError("no engine process")


@pytest.fixture(scope="module")
def named(served: stack.Stack, models: dict[str, Path]) -> stack.Stack:
    for name, folder in models.items():
        served.admin.register({"name": name, "uri": str(folder)})
    return served


def test_answers_by_name_are_transformers_own(named: stack.Stack, models: dict[str, Path]) -> None:
    for name, folder in models.items():
        assert stream_text(named, name, PROMPT, 24) == greedy(folder, PROMPT, 24)


def test_grpc_gives_the_same_text(named: stack.Stack) -> None:
    request = fmaas.BatchedGenerationRequest(
        requests=[fmaas.GenerationRequest(text=PROMPT)],
        params=fmaas.Parameters(stopping=fmaas.StoppingCriteria(max_new_tokens=24)),
    )
    with grpc.insecure_channel(named.grpc) as channel:
        answer = tgis_client.generate(channel, request, (("mm-model-id", "ada"),))
        assert answer.responses[0].text == stream_text(named, "ada", PROMPT, 24)
        assert answer.responses[0].generated_token_count == 24


def test_unknown_name_is_answered_with_the_served_ones(named: stack.Stack) -> None:
    with pytest.raises(openai.NotFoundError, match="ada"):
        stream_text(named, "nobody", PROMPT, 4)


def test_engine_killed_mid_stream_loses_that_stream_only(named: stack.Stack) -> None:
    before = stream_text(named, "ada", PROMPT, 16)
    stream = client_of(named).completions.create(
        model="ada", prompt=PROMPT, max_tokens=450, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    engine_process(named).send_signal(signal.SIGKILL)
    with pytest.raises((openai.APIError, openai.APIConnectionError)):
        for _ in stream:
            pass
    assert stream_text(named, "ada", PROMPT, 16) == before


def test_client_that_leaves_frees_its_row(named: stack.Stack) -> None:
    stream = client_of(named).completions.create(
        model="bob", prompt=PROMPT, max_tokens=450, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 20
    while named.admin.model("bob").running:
        assert time.monotonic() < deadline, "the row still runs"
        time.sleep(0.1)


def test_registrations_survive_kill_9(tmp_path: Path, models: dict[str, Path]) -> None:
    home = tmp_path / "home"
    with stack.serve("--device", "cpu", "--memory", "64MiB", home=home, log=tmp_path / "log") as served:
        assert client_of(served).models.list().data == []
        many = [f"org/model-{number:03}" for number in range(60)]
        for name in many:
            served.admin.register({"name": name, "uri": str(models["bob"])})
        served.admin.register({"name": "ada", "uri": str(models["ada"])})
        before = stream_text(served, "ada", PROMPT, 8)
        processes = [psutil.Process(served.pid), *psutil.Process(served.pid).children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended with its parent
                process.kill()
        psutil.wait_procs(processes, timeout=20)
    with stack.serve("--device", "cpu", "--memory", "64MiB", home=home, log=tmp_path / "log") as served:
        assert [model.id for model in client_of(served).models.list()] == ["ada", *many]
        assert stream_text(served, "ada", PROMPT, 8) == before
        assert stream_text(served, many[-1], PROMPT, 8)


def test_serve_takes_over_after_kill_9_of_the_one_before(tmp_path: Path, models: dict[str, Path]) -> None:
    """A stream runs and a load is under way. The restart gets the same addresses at once, and blames no model."""
    home, log = tmp_path / "home", tmp_path / "log"
    flags = ("--device", "cpu", "--memory", "64MiB", "--model-roots", "/")
    with stack.serve(*flags, home=home, log=log) as served:
        served.admin.register({"name": "ada", "uri": str(models["ada"])})
        expected = stream_text(served, "ada", PROMPT, 8)
        stream = client_of(served).completions.create(
            model="ada", prompt=PROMPT, max_tokens=450, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        served.admin.register({"name": "bob", "uri": str(models["bob"]), "quantize": "int8"})
        served.admin.load("bob")
        wait_until(lambda: _state(served, "bob") in ("packing", "loading", "loaded"), 60)
        left = psutil.Process(served.pid).children(recursive=True)
        os.kill(served.pid, signal.SIGKILL)
        addresses = ("--http-listen", served.url.removeprefix("http://"), "--grpc-listen", served.grpc)
        again = subprocess.Popen(
            [sys.executable, "-m", "mesh", "serve", "--home", str(home), *addresses, *flags], stderr=log.open("ab")
        )
        try:
            psutil.wait_procs(left, timeout=20)
            assert not [process for process in left if process.is_running()]
            until_s = time.monotonic() + 120
            while (state := _state(served, "bob")) != "loaded":
                assert state not in ("failed", "quarantined"), served.admin.model("bob").error
                assert again.poll() is None
                assert time.monotonic() < until_s
                time.sleep(0.1)
            assert stream_text(served, "ada", PROMPT, 8) == expected
        finally:
            again.send_signal(signal.SIGTERM)
            again.wait(60)


def _state(served: stack.Stack, name: str) -> str:
    with contextlib.suppress(MeshError):  # not up yet
        return served.admin.model(name).state
    return ""


def test_context_that_memory_cannot_hold_is_cut_as_fit_predicts(served: stack.Stack, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "long", max_position=1_000_000)
    served.admin.register({"name": "long", "uri": str(folder)})
    fit = served.admin.fit({"name": "long"})
    assert (fit.fits, fit.wanted_model_len) == (True, 1_000_000)
    stack.load_and_wait(served, "long", str(folder))
    [copy] = served.admin.model("long").copies
    until_s = time.monotonic() + 10
    while not copy.max_model_len and time.monotonic() < until_s:  # the runtime reports it with its next snapshot
        [copy] = served.admin.model("long").copies
        time.sleep(0.05)
    assert copy.wanted_model_len == 1_000_000
    assert copy.max_model_len == pytest.approx(fit.max_model_len, rel=0.05)  # a slab more or less of weights
    listed = {model.id: model for model in client_of(served).models.list().data}
    assert listed["long"].model_extra is not None
    assert listed["long"].model_extra["max_model_len"] == copy.max_model_len
    shown = subprocess.run(
        [sys.executable, "-m", "mesh", "show", "long", "--server", served.url],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"{copy.max_model_len:,} tokens, cut from 1,000,000" in " ".join(shown.stdout.split())


def test_serve_exits_with_one_sentence_for_a_budget_that_no_machine_has(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "mesh", "serve", "--home", str(tmp_path), "--device", "cpu", "--memory", "100TiB"]
        + [f"--{kind}-listen=127.0.0.1:{stack.free_port()}" for kind in ("http", "grpc")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1
    assert ended.stderr.count("exceeds this machine's memory") == 1
    assert "Traceback" not in ended.stderr


def test_sigterm_lets_streams_finish_and_every_line_of_a_json_log_is_json(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    with stack.serve("--device", "cpu", "--memory", "64MiB", "--log-json", log=tmp_path / "log") as served:
        served.admin.register({"name": "ada", "uri": str(models["ada"])})
        expected = stream_text(served, "ada", PROMPT, 200)
        stream = client_of(served).completions.create(
            model="ada", prompt=PROMPT, max_tokens=200, temperature=0, stream=True
        )
        pieces = [next(iter(stream)).choices[0].text]
        os.kill(served.pid, signal.SIGTERM)
        pieces += [part.choices[0].text for part in stream if part.choices]
        assert "".join(pieces) == expected
    said = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["http"] for line in said if line["message"] == "ready"] == [served.url]


def test_command_line_verbs_work_against_serve(served: stack.Stack, models: dict[str, Path]) -> None:
    def repertory(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "mesh", *arguments, "--server", served.url],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    served.admin.register({"name": "cyd", "uri": str(models["cyd"])})
    assert "loaded" in repertory("register", "dan", str(models["cyd"]), "--load", "--max-model-len", "256")
    assert "dan" in repertory("ps")
    assert repertory("run", "dan", PROMPT, "--max-tokens", "4", "--temperature", "0").strip()
    # the prompt's words may come after the options too
    assert repertory("run", "dan", "--max-tokens", "4", "--temperature", "0", *PROMPT.split()).strip()
    assert "fits" in repertory("fit", "dan")
    assert json.loads(repertory("fit", str(models["bob"]), "--json"))["fits"]
    assert json.loads(repertory("show", "dan", "--json"))["state"] == "loaded"
    assert "dan" in [model["name"] for model in json.loads(repertory("ps", "--json"))]
    assert "256" in repertory("show", "dan")
    repertory("alias", "theirs", "dan")
    assert stream_text(served, "theirs", PROMPT, 8) == stream_text(served, "cyd", PROMPT, 8)
    repertory("stop", "dan")
    assert served.admin.model("dan").state != "loaded"
    repertory("alias", "theirs", "--delete")
    repertory("rm", "dan")
    assert "dan" not in repertory("ps")


def test_run_holds_a_conversation_in_a_terminal(served: stack.Stack, models: dict[str, Path]) -> None:
    served.admin.register({"name": "bob", "uri": str(models["bob"])})
    command = [
        sys.executable,
        "-m",
        "mesh",
        "run",
        "bob",
        "--max-tokens",
        "6",
        "--temperature",
        "0",
        "--server",
        served.url,
    ]
    here, there = os.openpty()
    with subprocess.Popen(command, stdin=there, stdout=there, stderr=there, start_new_session=True) as talk:
        os.close(there)
        try:
            assert "talking to bob" in _until_prompt(here)
            os.write(here, b"hello\n")
            first = _until_prompt(here)
            assert len(first.replace("hello", "").strip(" >\r\n")) > 0
            os.write(here, b"/clear\n")
            _until_prompt(here)
            os.write(here, b"hello\n")
            assert _until_prompt(here) == first
            os.write(here, b"/bye\n")
            assert talk.wait(20) == 0
        finally:
            talk.kill()
            os.close(here)


def _until_prompt(terminal: int) -> str:
    """What is shown up to the next prompt, without what a terminal shows on the way and takes back."""
    shown = b""
    while not shown.endswith(b">>> "):
        ready, _, _ = select.select([terminal], [], [], 60)
        assert ready, shown
        shown += os.read(terminal, 4096)
    return re.sub(r"\r\x1b\[K[^\r]*(?=\r\x1b\[K)|\r\x1b\[K", "", shown.decode("utf-8", "replace"))
