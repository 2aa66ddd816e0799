"""Recognises HTTP paths that a proxy or a server behind this one could read as another path."""

import re
from urllib.parse import unquote

_DOTS = frozenset({".", ".."})
_CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")


def is_ambiguous(raw_path: str) -> bool:
    """Return whether a request target, as it was sent, has a `.` or `..` segment, a backslash or a control character, encoded or not."""
    path = unquote(raw_path.partition("?")[0])
    return _CONTROL.search(path) is not None or not _DOTS.isdisjoint(path.split("/"))
