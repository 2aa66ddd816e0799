"""What mesh and runtime each have of their own, since neither may import the other, and what must still be one thing to whoever runs both."""

import logging
import sys
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import mesh.configure
import mesh.logs
import runtime.config.loader
import runtime.observability.logs

sizes = st.from_regex(r"\A\s?[0-9]{1,6}(\.[0-9]{1,3})?\s?[kmgtKMGTx]?i?[bB]?\Z")


def outcome(parse: Callable[[str], int], text: str) -> int | str:
    try:
        return parse(text)
    except ValueError as error:
        return str(error)


@given(sizes | st.text(max_size=6))
@example("40GiB")
@example("40GB")
@example("1.5 t")
def test_a_size_is_the_same_to_both(text: str) -> None:
    assert outcome(mesh.configure.parse_size, text) == outcome(runtime.config.loader.parse_size, text)


def record(**extra: object) -> logging.LogRecord:
    try:
        raise OSError("no room")
    except OSError:
        made = logging.makeLogRecord(
            {
                "name": "a.b",
                "levelno": logging.WARNING,
                "levelname": "WARNING",
                "msg": "%s left",
                "args": ("m",),
                **extra,
            }
        )
        made.exc_info = sys.exc_info() if "model" in extra else None
        return made


@pytest.mark.parametrize("as_json", [True, False])
def test_a_line_of_the_log_looks_the_same_from_both(as_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve` writes both into one stream."""
    handlers: list[logging.Handler] = []
    monkeypatch.setattr(logging, "basicConfig", lambda **options: handlers.extend(options["handlers"]))
    monkeypatch.setattr(logging.Logger, "setLevel", lambda *_: None)
    mesh.logs.set_up(as_json=as_json, level="info")
    runtime.observability.logs.set_up(as_json=as_json, level="info")
    at = {"created": 1_800_000_000.25, "msecs": 250.0}
    for fields in (at, {**at, "model": "m", "seconds": 1.5, "empty": ""}):
        ours, theirs = (handler.format(record(**fields)) for handler in handlers)
        assert ours == theirs
        assert "m left" in ours
        assert "2027-01-15T08:00:00.250Z" in ours
