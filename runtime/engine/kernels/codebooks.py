"""Defines the 4-bit data types: the 16 values that the codes of NF4, FP4 and two of GGUF's block types stand for."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

Codebook = Literal["nf4", "fp4", "q4_0", "iq4_nl"]

# bitsandbytes' tables. NF4: quantiles of a normal distribution. FP4: floats with a sign bit, two exponent bits and one
# mantissa bit. ggml's tables: Q4_0 has integers, IQ4_NL integers that lie closer around zero. All of them are exact in
# bfloat16 and float16.
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
        "q4_0": tuple(float(code - 8) for code in range(16)),
        "iq4_nl": (
            -127.0,
            -104.0,
            -83.0,
            -65.0,
            -49.0,
            -35.0,
            -22.0,
            -10.0,
            1.0,
            13.0,
            25.0,
            38.0,
            53.0,
            69.0,
            89.0,
            113.0,
        ),
    }
)


def codebook_values(codebook: Codebook) -> tuple[float, ...]:
    """Return the value of each of the 16 codes, relative to the scale of its block."""
    return _CODES[codebook]
