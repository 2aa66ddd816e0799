"""Who took the engine down how often, and who is therefore not tried again. Pure bookkeeping; knows no processes."""

from collections.abc import Sequence
from dataclasses import dataclass

_LIMIT = 2.0


@dataclass(slots=True)
class _Record:
    fingerprint: bytes
    strikes: float


class Quarantine:
    """Strikes by model id. A death with one suspect is a whole strike; with several, half a strike each: the next death will tell.

    A record is of one source and its settings: the same id with others starts clean.
    """

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}

    def strike(self, suspects: Sequence[tuple[str, bytes]]) -> None:
        """Blame one death on these (id, fingerprint) pairs."""
        for model_id, fingerprint in suspects:
            record = self._records.get(model_id)
            if record is None or record.fingerprint != fingerprint:
                record = self._records[model_id] = _Record(fingerprint, 0.0)
            record.strikes += 1.0 if len(suspects) == 1 else 0.5

    def holds(self, model_id: str, fingerprint: bytes) -> bool:
        record = self._records.get(model_id)
        return record is not None and record.fingerprint == fingerprint and record.strikes >= _LIMIT

    def forgive(self, model_id: str) -> None:
        """Someone took the model away on purpose: it may come once more, and one more death is its last."""
        record = self._records.get(model_id)
        if record is not None:
            record.strikes = min(record.strikes, _LIMIT - 1.0)
