"""Defines the 4-bit data types: the 16 values that the codes of NF4 and FP4 stand for."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

Codebook = Literal["nf4", "fp4"]

# bitsandbytes' tables. NF4: quantiles of a normal distribution. FP4: floats with a sign bit, two exponent bits and one
# mantissa bit.
_CODES: Mapping[Codebook, tuple[float, ...]] = MappingProxyType(
    {
        "nf4": (
            -1.0,
            -0.6961928009986877,
            -0.5250730514526367,
            -0.39491748809814453,
            -0.28444138169288635,
            -0.18477343022823334,
            -0.09105003625154495,
            0.0,
            0.07958029955625534,
            0.16093020141124725,
            0.24611230194568634,
            0.33791524171829224,
            0.44070982933044434,
            0.5626170039176941,
            0.7229568362236023,
            1.0,
        ),
        "fp4": (
            0.0,
            0.0052083333333,
            0.6666666666667,
            1.0,
            0.3333333333333,
            0.5,
            0.1666666666667,
            0.25,
            -0.0,
            -0.0052083333333,
            -0.6666666666667,
            -1.0,
            -0.3333333333333,
            -0.5,
            -0.1666666666667,
            -0.25,
        ),
    }
)


def codebook_values(codebook: Codebook) -> tuple[float, ...]:
    """Return the value of each of the 16 codes, relative to the block's absmax."""
    return _CODES[codebook]
