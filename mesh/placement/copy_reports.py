"""Computes what a pod's record says of the pod's copies, and keeps the reports of copies that have not changed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from common.model_state import CopyState, ModelState
from mesh.placement.copies import LocalCopy
from mesh.placement.model_status import copy_state

_DIGITS = 3  # of fractions: every pod receives each record
_FRACTIONS = tuple(figure.name for figure in msgspec.structs.fields(ModelState) if figure.type is float)


@dataclass(frozen=True, slots=True)
class _Known:
    """A report with what it was made from. `settled`: the report without the figures that change with every request."""

    state: CopyState
    size_bytes: int
    model: ModelState | None
    report: ModelState
    settled: ModelState


class CopyReports:
    """Of thousands of copies, few change between two reports."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def update(self, copies: Iterable[LocalCopy], models: Mapping[str, ModelState]) -> None:
        """Make the reports of these copies. `models`: the runtime's states by model id."""
        before, self._known = self._known, {}
        for copy in copies:
            known, model = before.get(copy.model_id), models.get(copy.model_id)
            if (
                known is None
                or known.model is not model
                or known.state is not copy.state
                or known.size_bytes != copy.size_bytes
            ):
                report = _rounded(copy_state(copy.model_id, copy.state, copy.size_bytes, model))
                known = _Known(copy.state, copy.size_bytes, model, report, report.settled())
            self._known[copy.model_id] = known

    def reports(self) -> dict[str, ModelState]:
        """Return the reports as a record holds them, by model id."""
        return {model_id: known.report for model_id, known in self._known.items()}

    def settled(self) -> dict[str, ModelState]:
        """Return the reports without the figures that change with every request, by model id."""
        return {model_id: known.settled for model_id, known in self._known.items()}


def _rounded(report: ModelState) -> ModelState:
    """Return the report as a record holds it: without the id, which is its key, and with few digits."""
    fractions = {name: round(getattr(report, name), _DIGITS) for name in _FRACTIONS}
    return msgspec.structs.replace(report, model_id="", **fractions)
