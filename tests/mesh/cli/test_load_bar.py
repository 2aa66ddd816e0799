"""`repertory load` against a mesh that is scripted: it ends when the load does, however that is."""

import argparse
from collections import deque
from dataclasses import dataclass, field

import pytest

from mesh.cli import commands
from mesh.client.admin import AdminClient, Model
from mesh.errors import LoadFailed


@dataclass(frozen=True)
class ScriptedClient(AdminClient):
    """Each look at a model gives the next state; the last one stays."""

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


def test_it_waits_until_the_model_is_loaded() -> None:
    client = scripted(Model("m"), Model("m", state="queued"), Model("m", state="loaded", status="LOADED"))
    assert ask(client) == 0
    assert client.asked == ["m"]


def test_a_failure_is_told_with_its_cause() -> None:
    with pytest.raises(LoadFailed, match="m: no such file"):
        ask(scripted(Model("m", state="pulling"), Model("m", state="failed", error="no such file")))


def test_a_load_that_was_given_up_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "_NO_LOAD_S", 0.5)
    with pytest.raises(LoadFailed, match="not being loaded"):
        ask(scripted(Model("m", state="queued"), Model("m")))


def test_who_stops_waiting_is_told_that_the_load_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask(scripted(Model("m", state="pulling")))
    assert "repertory stop m" in capsys.readouterr().err
