"""Logs on stderr, as JSON lines for machines or as text for people, with the fields that the caller passed as `extra`.

Callers never pass a prompt or a secret.
"""

import json
import logging
import sys
import time
from typing import Any

_RECORD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

# The names of log4j that Python's logging does not have.
_OTHER_LEVELS = {"TRACE": "DEBUG", "ALL": "DEBUG", "OFF": "CRITICAL"}


def set_up(*, as_json: bool, level: str) -> None:
    """Configure logging for the process. Raises ValueError for an unknown level."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
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
        extra = "".join(f" {key}={value}" for key, value in _extra(record).items() if value not in ("", None))
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
    return {key: value for key, value in vars(record).items() if key not in _RECORD_ATTRIBUTES}


def _time(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
