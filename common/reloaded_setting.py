"""Reads a setting that is given as text or as `@FILE`, and reads the file again when it changes."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from common.errors import ConfigError
from common.watched_files import WatchedFiles

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CHECK_S = 1.0


class ReloadedSetting(Generic[T]):
    """`name` is used in messages. `parse` may raise msgspec's errors. An empty text stands for `default`.

    Raises ConfigError for a setting that cannot be read. Later a file that cannot be read is logged, and what it held stays in force.
    """

    def __init__(
        self, name: str, text: str, parse: Callable[[bytes], T], default: T, *, check_s: float = _CHECK_S
    ) -> None:
        self._parse = parse
        self._check_s = check_s
        self._next_s = time.monotonic() + check_s
        self._file = Path(text[1:]) if text.startswith("@") else None
        self._what = name if self._file is None else f"{name} file {self._file}"
        if self._file is not None:
            self._watched = WatchedFiles([str(self._file)])
            self._value = self._read(self._file)
        else:
            self._value = self._parsed(text.encode()) if text else default

    @property
    def value(self) -> T:
        """The newest value, at most a second old."""
        if self._file is not None and time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + self._check_s
            if self._watched.changed():
                self._reload(self._file)
        return self._value

    def _reload(self, file: Path) -> None:
        try:
            self._value = self._read(file)
            logger.info("read the %s again", self._what)
        except ConfigError as error:
            logger.warning("%s; its last content stays in force", error)

    def _read(self, file: Path) -> T:
        try:
            return self._parsed(file.read_bytes())
        except OSError as error:
            raise ConfigError(f"{self._what}: {error.strerror}") from None

    def _parsed(self, content: bytes) -> T:
        try:
            return self._parse(content)
        except (ValueError, msgspec.MsgspecError) as error:
            raise ConfigError(f"{self._what}: {error}") from None
