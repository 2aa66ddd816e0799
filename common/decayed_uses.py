"""Counts the uses of models with decay: recency and frequency in one number."""

_HALF_LIFE_USES = 250
_MAX_MODELS = 20_000
_NEGLIGIBLE = 0.01


class DecayedUses:
    """Decayed uses by model. A use counts half after `half_life_uses` uses of any models, so that idle hours change no order."""

    def __init__(self, half_life_uses: float = _HALF_LIFE_USES) -> None:
        self._decay = 0.5 ** (1 / half_life_uses)
        self._now = 0
        self._values: dict[str, tuple[float, int]] = {}

    def add(self, model_id: str, count: int = 1) -> None:
        """Count uses, one after the other."""
        value, decay = self.of(model_id), self._decay**count
        self._now += count
        # The uses themselves are the geometric series 1 + decay + decay² + …
        self._values[model_id] = value * decay + (1 - decay) / (1 - self._decay), self._now
        if len(self._values) > _MAX_MODELS:
            self._drop_negligible()

    def seed(self, model_id: str, value: float) -> None:
        """Raise a model's value to what another pod has counted."""
        if value > self.of(model_id):
            self._values[model_id] = value, self._now

    def of(self, model_id: str) -> float:
        value, at = self._values.get(model_id, (0.0, 0))
        return float(value * self._decay ** (self._now - at))

    def forget(self, model_id: str) -> None:
        self._values.pop(model_id, None)

    def _drop_negligible(self) -> None:
        kept = {model_id: entry for model_id, entry in self._values.items() if self.of(model_id) >= _NEGLIGIBLE}
        self._values = kept if len(kept) < _MAX_MODELS else {}
