"""Picks the model that runs next: deficit round robin, in microseconds of device time.

A round gives `quantum_us` to every model with work. A model with credit left may run, one step per turn, and pays the step's duration afterwards.
Negative credit carries over; positive credit is capped at one share. A model without work pays its debt off as rounds go by, and starts again with one
share. In every stretch of (models × quantum), each model gets its share to within one step (Shreedhar and Varghese, SIGCOMM 1995).
"""

import math
from collections.abc import Collection


class RoundRobin:
    def __init__(self, quantum_us: float) -> None:
        self._quantum_us = quantum_us
        self._credit_us: dict[str, float] = {}  # in order of turns; the models that had work at the last pick
        self._debts_us: dict[str, float] = {}  # of models without work

    def forget(self, model_id: str) -> None:
        self._credit_us.pop(model_id, None)
        self._debts_us.pop(model_id, None)

    def credit_us(self, model_id: str) -> float:
        return self._credit_us.get(model_id, 0.0)

    def pick(self, active: Collection[str]) -> str | None:
        """Return the model of `active` whose turn it is, and move it to the end of the order."""
        if not active:
            return None
        for model_id in [m for m in self._credit_us if m not in active]:
            credit_us = self._credit_us.pop(model_id)
            if credit_us < 0:
                self._debts_us[model_id] = credit_us
        for model_id in active:
            if model_id not in self._credit_us:
                self._credit_us[model_id] = self._quantum_us + self._debts_us.pop(model_id, 0.0)
        chosen = self._first_with_credit()
        if chosen is None:
            self._new_round()
            chosen = self._first_with_credit()
        if chosen is not None:
            self._credit_us[chosen] = self._credit_us.pop(chosen)
        return chosen

    def charge(self, model_id: str, device_us: float) -> None:
        if model_id in self._credit_us:
            self._credit_us[model_id] -= device_us
        elif model_id in self._debts_us:
            self._debts_us[model_id] -= device_us

    def _first_with_credit(self) -> str | None:
        return next((m for m, credit in self._credit_us.items() if credit > 0), None)

    def _new_round(self) -> None:
        quantum_us = self._quantum_us
        # Play as many rounds at once as the model with the smallest debt needs.
        rounds = math.floor(-max(self._credit_us.values()) / quantum_us) + 1
        for model_id, credit_us in self._credit_us.items():
            self._credit_us[model_id] = min(credit_us + rounds * quantum_us, quantum_us)
        for model_id, debt_us in list(self._debts_us.items()):
            debt_us += rounds * quantum_us
            if debt_us < 0:
                self._debts_us[model_id] = debt_us
            else:
                del self._debts_us[model_id]
