"""Decides whether records that are missing from a listing are a mass loss, such as a wiped etcd, or were deleted on purpose."""

_MIN_MISSING = 10


def is_mass_loss(num_known: int, num_missing: int, *, went_back: bool) -> bool:
    """Return whether more than half of the known records are missing.

    `went_back`: the store was replaced or restored, so its history does not explain any missing record. Otherwise at least 10 must be missing,
    because a few models may have been unregistered while this pod was not watching.
    """
    least = 1 if went_back else _MIN_MISSING
    return num_missing >= least and 2 * num_missing > num_known
