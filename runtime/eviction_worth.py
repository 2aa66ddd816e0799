"""Orders idle models by what keeping them on the device saves."""

_LEAST_RETURN_S = 0.01  # Below this all returns cost the same.


def eviction_worth(use: float, return_cost_s: float, slabs: int) -> float:
    """Return what keeping a model saves per slab: its decayed uses (recency and frequency in one number) times the seconds of its return."""
    return use * max(return_cost_s, _LEAST_RETURN_S) / max(slabs, 1)
