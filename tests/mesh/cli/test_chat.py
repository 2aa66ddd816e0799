"""`repertory run` in a terminal: a conversation with its commands, several lines, statistics, and Ctrl-C at any time."""

import re
import sys
from collections.abc import Iterator

import msgspec
import pytest

from common.units import GIB
from mesh.client.admin import Model
from tests.support.admin_server import AdminServer
from tests.support.terminal import Screen, run_in_terminal

CHAT = "/v1/chat/completions"


@pytest.fixture
def server() -> Iterator[AdminServer]:
    made = AdminServer([Model("smol", "smol__0123456789", "/smol", status="NOT_LOADED")])
    yield made
    made.close()


def run(server: AdminServer, *arguments: str, typed: list[tuple[str, str]] | None = None) -> Screen:
    command = [sys.executable, "-m", "mesh", "run", *arguments]
    screen = run_in_terminal(command, environment={"REPERTORY_SERVER": server.url}, typed=typed or [])
    assert "Traceback" not in screen.raw
    return screen


def test_run_refuses_an_unknown_name_before_a_chat_opens(server: AdminServer) -> None:
    screen = run(server, "smoll")
    assert screen.status == 1
    assert "model not found: 'smoll'" in screen.text
    assert ">>>" not in screen.text


def test_run_loads_the_model_while_the_user_types(server: AdminServer) -> None:
    screen = run(server, "smol", typed=[(">>> ", "/bye\n")])
    assert screen.status == 0
    assert server.asked("/models/load") == [{"model": "smol"}]
    assert server.asked(CHAT) == []


def test_run_keeps_the_conversation_until_it_is_cleared(server: AdminServer) -> None:
    typed = [(">>> ", keys) for keys in ("one\n", "two\n", "/clear\n", "three\n", "\x04")]
    assert run(server, "smol", "--system", "Be brief.", typed=typed).status == 0
    asked = [[message["content"] for message in body["messages"]] for body in server.asked(CHAT)]  # type: ignore[attr-defined]
    answer = "The capital is Paris."
    assert asked == [["Be brief.", "one"], ["Be brief.", "one", answer, "two"], ["Be brief.", "three"]]


def test_run_takes_several_lines_between_quotes(server: AdminServer) -> None:
    typed = [(">>> ", '"""first\n'), ("... ", "second\n"), ("... ", 'third"""\n'), (">>> ", "/bye\n")]
    run(server, "smol", typed=typed)
    assert server.asked(CHAT)[0]["messages"] == [{"role": "user", "content": "first\nsecond\nthird"}]


def test_run_sets_and_shows_parameters(server: AdminServer) -> None:
    typed = [
        (">>> ", "/set temperature 0.5\n"),
        (">>> ", "/set heat 3\n"),
        ("/set heat 3: expected", "/show\n"),
        ("temperature  0.5", "hello\n"),
        (">>> ", "/bye\n"),
    ]
    run(server, "smol", typed=typed)
    assert server.asked(CHAT)[0]["temperature"] == 0.5
    assert "top_p" not in server.asked(CHAT)[0]


def test_run_verbose_shows_tokens_per_second(server: AdminServer) -> None:
    server.pause_s = 0.01
    screen = run(server, "smol", "hello", "--verbose")
    assert re.search(r"prompt  12 tokens, first token after \d+\.\d\d s", screen.text)
    assert re.search(r"answer  4 tokens in \d+\.\d\d s, \d+\.\d tokens per second", screen.text)


@pytest.mark.parametrize(
    ("weight_bytes", "settings", "flags", "sent"),
    [
        (GIB // 4, {}, [], {"temperature": 0.2, "top_p": 0.9, "repetition_penalty": 1.1}),
        (5 * GIB, {}, [], {}),
        (GIB // 4, {"sampling": {"temperature": 0.7}}, [], {}),
        (GIB // 4, {}, ["--temperature", "0"], {"temperature": 0.0}),
        (GIB // 4, {}, ["--sampling", "top_k=5"], {"top_k": 5}),
    ],
)
def test_run_samples_carefully_only_from_small_models_without_defaults(
    weight_bytes: int, settings: dict[str, object], flags: list[str], sent: dict[str, float], server: AdminServer
) -> None:
    server.models["smol"] = msgspec.structs.replace(server.models["smol"], weight_bytes=weight_bytes, settings=settings)
    assert run(server, "smol", "hello", *flags).status == 0
    body = server.asked(CHAT)[0]
    assert {
        name: body[name] for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty") if name in body
    } == sent


def test_ctrl_c_stops_an_answer_and_not_the_conversation(server: AdminServer) -> None:
    server.pause_s = 0.5
    screen = run(server, "smol", typed=[(">>> ", "hello\n"), ("The ", "\x03"), (">>> ", "/bye\n")])
    assert screen.status == 0
    assert "(stopped)" in screen.text


def test_ctrl_c_ends_an_answer_without_a_conversation(server: AdminServer) -> None:
    server.pause_s = 0.5
    assert run(server, "smol", "hello", typed=[("The ", "\x03")]).status == 130


def test_ctrl_c_at_the_prompt_ends_the_conversation(server: AdminServer) -> None:
    assert run(server, "smol", typed=[(">>> ", "\x03")]).status == 0
