"""Log lines: fields, exceptions, and no forged line."""

import asyncio
import io
import json
import logging
import sys

import pytest

from common.logs import JsonFormatter, LineFormatter, LineHandler, TextFormatter, log_fields
from tests.support.waiting import until


class CountingStream(io.StringIO):
    """Keeps what each call wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def write(self, text: str) -> int:
        self.texts.append(text)
        return len(text)


def record(message: str, *, with_error: bool = False, **extra: object) -> logging.LogRecord:
    made = logging.makeLogRecord(
        {"name": "a.b", "levelno": 30, "levelname": "WARNING", "msg": "%s left", "args": (message,), **extra}
    )
    made.created, made.msecs = 1_800_000_000.25, 250.0
    if with_error:
        try:
            raise OSError("no room")
        except OSError:
            made.exc_info = sys.exc_info()
    return made


def test_text_formatter_shows_fields_that_have_a_value() -> None:
    line = TextFormatter().format(record("m", model="x", seconds=1.5, empty=""))
    assert line == "2027-01-15T08:00:00.250Z warning a.b: m left model=x seconds=1.5"


def test_text_formatter_escapes_control_characters_of_callers() -> None:
    line = TextFormatter().format(record("a\r\nERROR forged\x1b[31m", model="b\nc"))
    assert "\n" not in line
    assert "\x1b" not in line
    assert "a\\r\\nERROR forged\\x1b[31m" in line
    assert "model=b\\nc" in line


def test_text_formatter_appends_the_traceback() -> None:
    assert TextFormatter().format(record("m", with_error=True)).endswith("OSError: no room")


def test_json_formatter_is_one_line_with_all_fields() -> None:
    line = JsonFormatter().format(record("a\nb", with_error=True, model="ñ"))
    assert "\n" not in line
    found = json.loads(line)
    assert (found["message"], found["model"], found["level"]) == ("a\nb left", "ñ", "warning")
    assert found["time"] == "2027-01-15T08:00:00.250Z"
    assert "no room" in found["exception"]


def test_json_formatter_escapes_what_terminals_and_line_readers_act_on() -> None:
    line = JsonFormatter().format(record("a\x9b31m\u2028b\x7f"))
    assert line.isprintable()
    assert json.loads(line)["message"] == "a\x9b31m\u2028b\x7f left"


def test_text_formatter_marks_the_lines_of_a_traceback() -> None:
    made = record("m")
    try:
        raise OSError("lost\n2027-01-15T08:00:00.250Z error a.b: forged\x1b[2J")
    except OSError:
        made.exc_info = sys.exc_info()
    first, *rest = TextFormatter().format(made).split("\n")
    assert first.endswith("m left")
    assert all(line.startswith("  | ") and line.isprintable() for line in rest)


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()], ids=["text", "json"])
def test_log_fields_is_shown_like_extra(formatter: logging.Formatter, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("tests.fields")
    caplog.set_level(logging.INFO, logger.name)
    fields = {"code": "OK", "asked": "org/m", "key": "", "total_s": 0.012}
    logger.info("request", extra=fields)
    log_fields(logger, logging.INFO, "request", fields)
    log_fields(logger, logging.DEBUG, "request", fields)
    by_extra, by_fields = caplog.records
    by_fields.created, by_fields.msecs = by_extra.created, by_extra.msecs
    assert formatter.format(by_fields) == formatter.format(by_extra)
    assert "org/m" in formatter.format(by_fields)


@pytest.fixture
def alone() -> logging.Logger:
    """A logger whose records reach only its own handlers: pytest adds some to the loggers that it can find."""
    return logging.Logger("tests.alone", logging.INFO)


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()], ids=["text", "json"])
def test_log_fields_without_a_record_shows_the_same(formatter: LineFormatter, alone: logging.Logger) -> None:
    fields = {"code": "OK", "asked": "a\nb", "key": "", "first_s": None, "total_s": 0.012}
    with_records, without = io.StringIO(), io.StringIO()
    handler = LineHandler(with_records, formatter)
    alone.addHandler(handler)
    alone.info("request", extra=fields)
    log_fields(alone, logging.DEBUG, "request", fields)
    handler.setStream(without)
    log_fields(alone, logging.INFO, "request", fields)
    (by_record,), (by_fields,) = with_records.getvalue().splitlines(), without.getvalue().splitlines()
    length = len("2027-01-15T08:00:00.250Z") + len('{"time": "')
    assert by_fields[length:] == by_record[length:]
    assert "a\\nb" in by_fields


def test_log_fields_reaches_every_handler(alone: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    lines = io.StringIO()
    alone.addHandler(LineHandler(lines, TextFormatter()))
    alone.addHandler(caplog.handler)
    log_fields(alone, logging.INFO, "request", {"code": "OK"})
    assert [vars(record)["code"] for record in caplog.records] == ["OK"]
    assert "request code=OK" in lines.getvalue()


def test_log_fields_respects_the_level_of_a_handler(alone: logging.Logger) -> None:
    lines = io.StringIO()
    handler = LineHandler(lines, TextFormatter())
    handler.setLevel(logging.ERROR)
    alone.addHandler(handler)
    log_fields(alone, logging.INFO, "request", {"code": "OK"})
    assert not lines.getvalue()


def test_log_fields_survives_a_closed_stream(alone: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    alone.addHandler(LineHandler(stream, TextFormatter()))
    stream.close()
    log_fields(alone, logging.INFO, "request", {"code": "OK"})
    assert "Logging error" in capsys.readouterr().err


async def test_log_fields_in_an_event_loop_writes_lines_in_one_piece_and_in_order(alone: logging.Logger) -> None:
    stream = CountingStream()
    alone.addHandler(LineHandler(stream, TextFormatter()))
    for number in range(3):
        log_fields(alone, logging.INFO, f"request {number}", {})
    assert not stream.texts
    await until(lambda: bool(stream.texts))
    [text] = stream.texts
    assert [line[-1] for line in text.splitlines()] == ["0", "1", "2"]
    log_fields(alone, logging.INFO, "request 3", {})
    alone.warning("a record")
    assert [text.split(": ")[1].strip() for text in stream.texts[1:]] == ["request 3", "a record"]


def test_lines_that_wait_are_written_by_the_next_loop_and_at_the_end_of_the_process(alone: logging.Logger) -> None:
    stream = io.StringIO()
    handler = LineHandler(stream, TextFormatter())
    alone.addHandler(handler)

    async def log(message: str) -> None:
        log_fields(alone, logging.INFO, message, {})

    async def wait() -> None:
        await log("second")
        await until(lambda: "second" in stream.getvalue())

    asyncio.run(log("first"))
    assert not stream.getvalue(), "the loop has ended before its timer"
    asyncio.run(wait())
    assert stream.getvalue().index("first") < stream.getvalue().index("second")
    asyncio.run(log("third"))
    handler.flush()  # as logging.shutdown does
    assert stream.getvalue().endswith("third\n")
