r"""The formats of quantised weights: which number each code stands for.

A format is data. Its codes are places in a codebook, $q \mapsto c_q$, or numbers themselves: whole
ones or float8 ones. All formats share the rest, $w = s\,c_q + o$, with a scale s and for some an
offset o for each block.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

# The quantiles of a normal distribution with an exact zero, scaled to [-1, 1]. Source: Dettmers et
# al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023, appendix E.
_NORMAL_LEVELS = (
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
)


def _dynamic_levels() -> tuple[float, ...]:
    """Returns 256 levels in [-1, 1], spaced by decades: 2^i fractions at each power of ten.

    With i leading bits for the exponent, decade i of seven holds the means of neighbouring points
    of 2^i + 1 that divide [0.1, 1], times 10^(i - 6). They are those of bitsandbytes to the last
    bit, so that its files need no levels of their own.

    Source: Dettmers, 8-Bit Approximations for Parallelism in Deep Learning, 2016, section 2.2;
    Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022, section 2.1.
    """
    positive = []
    for decade in range(7):
        points = _divided(2**decade)
        positive += list(np.float32(10.0 ** (decade - 6)) * ((points[:-1] + points[1:]) / 2))
    levels = [*positive, *(-level for level in positive), np.float32(0), np.float32(1)]
    return tuple(sorted(map(float, levels)))


def _divided(parts: int) -> np.ndarray:
    """Returns the points that divide [0.1, 1] into parts, as `torch.linspace` has them.

    The step is a float32. From each end, whole steps are added and rounded once, to the middle.
    """
    start, stop = np.float32(0.1), np.float32(1)
    step = (stop - start) / np.float32(parts)
    places = np.arange(parts + 1, dtype=np.float64)
    lower = start + places * np.float64(step)
    upper = stop - places[::-1] * np.float64(step)
    return np.where(places < (parts + 1) // 2, lower, upper).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """What the codes of one kind of quantised weight stand for.

    Attributes:
      name: the name that `quantize` takes.
      bits: the bits of a code; below eight, codes are packed into bytes.
      levels: the number that each code stands for; None where a code is its own number.
      dtype: the dtype of a code that is not packed; that of float8 codes is kept as bits in uint8,
        since XLA's compiler for CPUs converts a stack of float8 numbers to float16, outside of the
        loop that cuts it.
      is_signed: whether packed codes are two's complement.
      largest: what the largest absolute value of a block is scaled to; 0 for formats that are only
        read from files.
      is_offered: whether `quantize` takes its name.
    """

    name: str
    bits: int
    levels: tuple[float, ...] | None = None
    dtype: str = "uint8"
    is_signed: bool = False
    largest: float = 0.0
    is_offered: bool = False

    @property
    def is_packed(self) -> bool:
        """Whether several codes share bytes."""
        return self.bits < 8

    @property
    def is_float(self) -> bool:
        """Whether codes are floating-point numbers, which have exponents of their own."""
        return jnp.issubdtype(jnp.dtype(self.dtype), jnp.floating)

    def numbers(self, codes: Array, codebook: Array | None = None) -> Array:
        """Returns the number of each code, in float32.

        Args:
          codes: unpacked codes.
          codebook: the levels, in place of the format's own.
        """
        if codebook is None and self.levels is None:
            if self.is_packed and self.is_signed:
                sign = 1 << (self.bits - 1)
                codes = (codes ^ sign).astype(jnp.int8) - jnp.int8(sign)
            if self.is_float:
                codes = jax.lax.bitcast_convert_type(codes, jnp.dtype(self.dtype))
            return codes.astype(jnp.float32)
        levels = jnp.asarray(self.levels if codebook is None else codebook, jnp.float32)
        return _looked_up(codes, levels)


# Up to so many levels are chosen between by the bits of the code: selects vectorise on every
# backend, and a lookup does not.
_MOST_SELECTED = 16


def _looked_up(codes: Array, levels: Array) -> Array:
    """Returns the level of each code."""
    count = levels.shape[-1]
    if count > _MOST_SELECTED:
        return levels.at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")
    chosen = list(_tied(levels, codes))
    for bit in range(count.bit_length() - 1):
        is_set = (codes & (1 << bit)) != 0
        chosen = [
            jnp.where(is_set, second, first)
            for first, second in zip(chosen[::2], chosen[1::2], strict=True)
        ]
    return chosen[0]


def _tied(levels: Array, codes: Array) -> Array:
    """Returns the levels as values that depend on the codes.

    What depends on constants alone, such as a level as large as the weight, JAX moves out of a
    differentiated loop, and keeps it for as long as the loop runs.
    """
    first = codes.reshape(-1)[:1]
    return jax.lax.optimization_barrier((levels, first))[0]


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        each.name: each
        for each in (
            Format(name="nf4", bits=4, levels=_NORMAL_LEVELS, largest=1.0, is_offered=True),
            Format(name="int8", bits=8, dtype="int8", largest=127.0, is_offered=True),
            Format(name="int4", bits=4, is_signed=True, largest=7.0, is_offered=True),
            Format(name="fp8_e4m3", bits=8, dtype="float8_e4m3fn", largest=448.0, is_offered=True),
            Format(name="dynamic8", bits=8, levels=_dynamic_levels(), largest=1.0),
            Format(name="int6", bits=6, is_signed=True),
            Format(name="uint4", bits=4),
            Format(name="uint6", bits=6),
        )
    }
)
