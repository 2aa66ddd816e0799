"""`repertory load` against a scripted mesh: it waits for the end of the load and reports the outcome."""

import argparse
import re
import sys
from collections import deque
from dataclasses import dataclass, field

import pytest

from mesh.cli import commands
from mesh.client.admin import AdminClient, Model
from mesh.errors import LoadFailed
from tests.support.terminal import run_in_terminal


@dataclass(frozen=True)
class ScriptedClient(AdminClient):
    """Returns the next state at each query. The last state repeats."""

    states: deque[Model] = field(default_factory=deque)
    asked: list[str] = field(default_factory=list)

    def load(self, name: str) -> None:
        self.asked.append(name)

    def model(self, name: str) -> Model:
        return self.states.popleft() if len(self.states) > 1 else self.states[0]


def scripted(*states: Model) -> ScriptedClient:
    return ScriptedClient("http://nowhere", "", states=deque(states))


def ask(client: AdminClient) -> int:
    return commands.load(client, argparse.Namespace(name="m", json=True))


def test_load_waits_until_the_model_is_loaded() -> None:
    client = scripted(Model("m"), Model("m", state="queued"), Model("m", state="loaded", status="LOADED"))
    assert ask(client) == 0
    assert client.asked == ["m"]


def test_load_reports_the_cause_of_a_failure() -> None:
    with pytest.raises(LoadFailed, match="m: no such file"):
        ask(scripted(Model("m", state="pulling"), Model("m", state="failed", error="no such file")))


def test_load_ends_when_the_load_was_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "_LOAD_START_TIMEOUT_S", 0.5)
    with pytest.raises(LoadFailed, match="not being loaded"):
        ask(scripted(Model("m", state="queued"), Model("m")))


def test_load_interrupted_reports_that_loading_continues(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mesh.cli.commands.time.sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask(scripted(Model("m", state="pulling")))
    assert "repertory stop m" in capsys.readouterr().err


def test_load_bar_moves_while_the_progress_is_unknown() -> None:
    """A packer that reads a file reports no fraction; the bar pulses and the note changes. Each state stays until it was drawn, the first one four times."""
    script = (
        "import sys; from mesh.cli.render import LoadBar\n"
        "with LoadBar('m', enabled=True) as bar:\n"
        "    for state, fraction, note in (('packing', 0.0, 'reading'), ('packing', 0.5, 'layer 3'), ('loading', 0.0, '')):\n"
        "        bar.update(state, fraction, note); sys.stdin.readline()\n"
    )
    typed = [*[("reading", "")] * 3, ("reading", "\n"), ("layer 3", "\n"), ("m: loading", "\n")]
    raw = run_in_terminal([sys.executable, "-c", script], columns=100, typed=typed).raw
    packing = [line for line in re.split(r"[\r\n]", raw) if "m: packing" in line]
    assert len({line for line in packing if "reading" in line}) > 1, "the bar stood still"
    assert any("50 %" in line and "layer 3" in line for line in packing)
    assert "m: loading" in raw
