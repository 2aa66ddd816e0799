"""Logs on stderr, as JSON lines for machines or as text for people, with the fields that the caller passed as `extra`.

Callers never pass a prompt or a secret.
"""

import functools
import json
import logging
import sys
import time
from collections.abc import Mapping
from itertools import islice
from typing import Any

_OWN_ATTRIBUTES = tuple(vars(logging.makeLogRecord({})))
_RECORD_ATTRIBUTES = frozenset(_OWN_ATTRIBUTES) | {"message", "asctime", "taskName"}

_NOTHING = ("", None)

# The names of log4j that Python's logging does not have.
_OTHER_LEVELS = {"TRACE": "DEBUG", "ALL": "DEBUG", "OFF": "CRITICAL"}


def set_up(*, as_json: bool, level: str) -> None:
    """Configure logging for the process. Raises ValueError for an unknown level."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
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
    """Log a constant message with fields, for lines of which there are thousands a second: `extra` looks for the calling line, and checks each field."""
    if logger.isEnabledFor(level):
        record = logging.LogRecord(logger.name, level, "", 0, message, (), None)
        vars(record).update(fields)
        logger.handle(record)


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _json_escaped(json.dumps(line, default=str, ensure_ascii=False))


class TextFormatter(logging.Formatter):
    """Time, level, logger, message and the fields as `key=value`.

    Control characters are escaped, so that a name chosen by a caller cannot forge a line or drive a terminal.
    """

    def format(self, record: logging.LogRecord) -> str:
        extra = "".join([f" {key}={value}" for key, value in _extra(record).items() if value not in _NOTHING])
        head = f"{_time(record)} {record.levelname.lower():7} {record.name}: "
        text = head + _escaped(f"{record.getMessage()}{extra}")
        return f"{text}\n{_quoted(self.formatException(record.exc_info))}" if record.exc_info else text


def _quoted(text: str) -> str:
    """Mark each line of a traceback: an exception's text may hold lines that look like log lines."""
    return "\n".join(f"  | {_escaped(line)}" for line in text.splitlines())


def _json_escaped(text: str) -> str:
    """Escape what JSON leaves as it is and terminals or line readers act on, such as U+009B and U+2028."""
    return text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def _escaped(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    # A record's own attributes were set first.
    added = islice(vars(record).items(), len(_OWN_ATTRIBUTES), None)
    return {key: value for key, value in added if key not in _RECORD_ATTRIBUTES}


def _time(record: logging.LogRecord) -> str:
    return f"{_second(int(record.created))}.{int(record.msecs):03d}Z"


@functools.lru_cache(maxsize=2)
def _second(epoch_s: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(epoch_s))
