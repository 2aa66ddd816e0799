"""Logs on stderr, as JSON lines for machines or as text for people, with the fields that the caller passed as `extra`.

Callers never pass a prompt or a secret.
"""

import asyncio
import functools
import json
import logging
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import nullcontext
from itertools import islice
from typing import NamedTuple, TextIO

_OWN_ATTRIBUTES = tuple(vars(logging.makeLogRecord({})))
_RECORD_ATTRIBUTES = frozenset(_OWN_ATTRIBUTES) | {"message", "asctime", "taskName"}

_NOTHING = ("", None)
_GATHER_S = 0.02
_encode_json = json.JSONEncoder(default=str, ensure_ascii=False).encode

# The names of log4j that Python's logging does not have.
_OTHER_LEVELS = {"TRACE": "DEBUG", "ALL": "DEBUG", "OFF": "CRITICAL"}


def set_up(*, as_json: bool, level: str) -> None:
    """Configure logging for the process. Raises ValueError for an unknown level."""
    handler = LineHandler(sys.stderr, JsonFormatter() if as_json else TextFormatter())
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    # Neither formatter shows them, and each record costs a system call for them.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    # aiohttp logs an error for each client that closes its connection early.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    # httpx logs URLs, which may carry signatures.
    logging.getLogger("httpx").setLevel(logging.WARNING)


def set_level(level: str) -> None:
    """Set the lowest level that is logged, also by log4j's names. An unknown name is logged and means `info`."""
    name = _OTHER_LEVELS.get(level.upper(), level.upper())
    if name not in logging.getLevelNamesMapping():
        logging.getLogger(__name__).warning("unknown log level %s; using info", level)
        name = "INFO"
    logging.getLogger().setLevel(name)


def log_fields(logger: logging.Logger, level: int, message: str, fields: Mapping[str, object]) -> None:
    """Log a constant message with fields, for lines that are written thousands of times per second.

    Where only a LineHandler receives the line, it is written without a LogRecord, because making one costs more than the rest of the call.
    """
    if not logger.isEnabledFor(level):
        return
    handler = _only_handler(logger)
    if handler is not None:
        handler.write(Line(time.time(), logging.getLevelName(level), logger.name, message, fields))
        return
    record = logging.LogRecord(logger.name, level, "", 0, message, (), None)
    vars(record).update(fields)
    logger.handle(record)


class Line(NamedTuple):
    """What a line shows. `level`: as logging names it."""

    created_s: float
    level: str
    logger: str
    message: str
    fields: Mapping[str, object]


class LineFormatter(logging.Formatter):
    """Formats records and lines in the same way."""

    def format(self, record: logging.LogRecord) -> str:
        added = islice(vars(record).items(), len(_OWN_ATTRIBUTES), None)  # a record's own attributes were set first
        fields = {key: value for key, value in added if key not in _RECORD_ATTRIBUTES}
        line = Line(record.created, record.levelname, record.name, record.getMessage(), fields)
        return self.text(line, self.formatException(record.exc_info) if record.exc_info else "")

    def text(self, line: Line, exception: str = "") -> str:
        """Return the line without its end. `exception`: a traceback to show with it."""
        raise NotImplementedError


class JsonFormatter(LineFormatter):
    """One JSON object per line."""

    def text(self, line: Line, exception: str = "") -> str:
        shown: dict[str, object] = {
            "time": _time(line.created_s),
            "level": line.level.lower(),
            "logger": line.logger,
            "message": line.message,
            **line.fields,
        }
        if exception:
            shown["exception"] = exception
        return _json_escaped(_encode_json(shown))


class TextFormatter(LineFormatter):
    """Time, level, logger, message and the fields as `key=value`.

    Control characters are escaped, so that a name chosen by a caller cannot forge a line or drive a terminal.
    """

    def text(self, line: Line, exception: str = "") -> str:
        extra = "".join([f" {key}={value}" for key, value in line.fields.items() if value not in _NOTHING])
        head = f"{_time(line.created_s)} {line.level.lower():7} {line.logger}: "
        text = head + _escaped(f"{line.message}{extra}")
        return f"{text}\n{_quoted(exception)}" if exception else text


class LineHandler(logging.StreamHandler[TextIO]):
    """Writes lines to a stream, from records and without them, in the order of their calls.

    In an event loop, lines without records are written after a moment, several in one piece: between two requests, the code that formats a line has left
    the processor's caches, and one line takes as long as ten in a row. A process that is killed loses the lines of that moment.
    """

    def __init__(self, stream: TextIO, formatter: LineFormatter) -> None:
        super().__init__(stream)
        self.setFormatter(formatter)
        self._lines = formatter
        self._waiting = deque[Line]()
        self._due_in: asyncio.AbstractEventLoop | None = None  # where a timer writes the lines that wait

    def write(self, line: Line) -> None:
        """Write a line: after a moment in an event loop, at once elsewhere. An error is handled as that of a record is."""
        self._waiting.append(line)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._write_waiting()
            return
        if self._due_in is not loop:
            self._due_in = loop
            loop.call_later(_GATHER_S, self._write_waiting)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, after the lines that wait."""
        self._write_waiting()
        super().emit(record)

    def flush(self) -> None:
        """Write the lines that wait. Logging calls this when the process ends, too."""
        self._write_waiting()
        super().flush()

    def _write_waiting(self) -> None:
        self._due_in = None
        texts: list[str] = []
        with self.lock or nullcontext():
            while self._waiting:
                line = self._waiting.popleft()
                try:
                    texts.append(self._lines.text(line) + self.terminator)
                except Exception:
                    self.handleError(logging.makeLogRecord({"name": line.logger, "msg": line.message}))
            if texts:
                try:
                    self.stream.write("".join(texts))
                    self.stream.flush()
                except Exception:
                    self.handleError(logging.makeLogRecord({"name": line.logger, "msg": line.message}))


def _only_handler(logger: logging.Logger) -> LineHandler | None:
    """Return the handler of a logger's records if it is the only one, takes all of them, and is a LineHandler."""
    found: LineHandler | None = None
    at: logging.Logger | None = logger
    while at is not None:
        if at.filters:
            return None
        for handler in at.handlers:
            if found is not None or not isinstance(handler, LineHandler) or handler.level or handler.filters:
                return None
            found = handler
        at = at.parent if at.propagate else None
    return found


def _quoted(text: str) -> str:
    """Mark each line of a traceback: an exception's text may hold lines that look like log lines."""
    return "\n".join(f"  | {_escaped(line)}" for line in text.splitlines())


def _json_escaped(text: str) -> str:
    """Escape what JSON leaves as it is and terminals or line readers act on, such as U+009B and U+2028."""
    return text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def _escaped(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _time(epoch_s: float) -> str:
    second = int(epoch_s)
    return f"{_second(second)}.{int((epoch_s - second) * 1000):03d}Z"


@functools.lru_cache(maxsize=2)
def _second(epoch_s: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(epoch_s))
