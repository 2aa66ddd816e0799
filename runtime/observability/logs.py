"""Logs on stderr: JSON lines for machines or plain text for people, with the fields that the caller gave. Never a prompt, never a secret."""

import json
import logging
import sys
import time
from typing import Any

# what every LogRecord has; all else on it was given as `extra`
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def set_up(*, as_json: bool, level: str) -> None:
    """For the process. Raises ValueError for an unknown level."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if as_json else _Text())
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    # their connection errors are every client's ordinary end
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    # it writes URLs, and those may carry signatures
    logging.getLogger("httpx").setLevel(logging.WARNING)


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_given(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        given = "".join(f" {name}={value}" for name, value in _given(record).items() if value not in ("", None))
        text = f"{_time(record)} {record.levelname.lower():7} {record.name}: {record.getMessage()}{given}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def _given(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _OWN}


def _time(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
