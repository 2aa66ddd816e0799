"""Sizes in bytes, as people write them and as help texts show them."""

import re

KIB = 1024
MIB = 1024**2
GIB = 1024**3

_SIZE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?)b?\s*$", re.IGNORECASE)
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str) -> int:
    """Return the bytes of `123`, `4GiB` or `4G` (both binary), or `4GB` (decimal). Raises ValueError."""
    match = _SIZE.match(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write bytes or a number with KiB, MiB, GiB or TiB")
    number, unit, binary = match.groups()
    is_decimal = not binary and text.strip().lower().endswith("b") and unit != ""
    return int(float(number) * (1000 if is_decimal else 1024) ** _POWER[unit.lower()])


def format_size(size_bytes: int) -> str:
    """Return the shortest exact form that `parse_size` reads: `6GiB`, `512MiB`, or bytes."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size_bytes and size_bytes % unit == 0:
            return f"{size_bytes // unit}{name}"
    return str(size_bytes)


def size(num_bytes: int) -> str:
    """Return a rounded size such as `98 MiB`, or an empty string for 0."""
    if num_bytes <= 0:
        return ""
    value, unit = float(num_bytes), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} {_UNITS[unit]}" if value >= 10 or unit == 0 else f"{value:.1f} {_UNITS[unit]}"
