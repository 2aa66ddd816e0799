"""Counts the engine crashes of each model and blocks models that crashed the engine repeatedly."""

from collections.abc import Sequence
from dataclasses import dataclass

_LIMIT = 2.0


@dataclass(slots=True)
class _Record:
    fingerprint: bytes
    strikes: float


class Quarantine:
    """Strikes by model id. A crash with one suspect is one strike. With several suspects each gets half a strike.

    A record belongs to one source and its settings: the same id with other files or settings starts without strikes.
    """

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}

    def strike(self, suspects: Sequence[tuple[str, bytes]]) -> None:
        """Record one crash for these (id, fingerprint) pairs."""
        for model_id, fingerprint in suspects:
            record = self._records.get(model_id)
            if record is None or record.fingerprint != fingerprint:
                record = self._records[model_id] = _Record(fingerprint, 0.0)
            record.strikes += 1.0 if len(suspects) == 1 else 0.5

    def holds(self, model_id: str, fingerprint: bytes) -> bool:
        record = self._records.get(model_id)
        return record is not None and record.fingerprint == fingerprint and record.strikes >= _LIMIT

    def allow_retry(self, model_id: str) -> None:
        """Allow one more load, for an explicit load request. The next crash quarantines the model again."""
        record = self._records.get(model_id)
        if record is not None:
            record.strikes = min(record.strikes, _LIMIT - 1.0)


def quarantine_text(name: str) -> str:
    """Return the reason that callers of a quarantined model get, with the way out."""
    return f"model {name!r} is quarantined: the engine died twice while it was running; unload it, or register it again, to retry"
