"""Moving a weight: an op on the base, applied to the factors, the windows and the gain too."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from lora_jax._compat import Equation
from lora_jax.transform._bases import moved_bases
from lora_jax.transform._factored import Factored
from lora_jax.transform._terms import Windows


def moved(
    equation: Equation,
    value: Factored,
    factor_moved: Callable[[Array], Array],
    windows_moved: Callable[[Windows], Windows] = lambda windows: windows,
) -> Factored:
    """Returns the value with the equation applied to its base, its counterpart to the factors.

    Args:
      equation: an op on the weight alone.
      value: the weight.
      factor_moved: the op's counterpart for an aligned factor.
      windows_moved: the op's counterpart for the windows of a term.
    """
    return with_base(value, moved_bases(equation, [value])[0], factor_moved, windows_moved)


def with_base(
    value: Factored,
    base: Any,
    factor_moved: Callable[[Array], Array],
    windows_moved: Callable[[Windows], Windows] = lambda windows: windows,
) -> Factored:
    """Returns the same as `moved` beside a base that was moved already."""
    terms = tuple(
        term.rearranged(
            factor_moved(term.lora_A), factor_moved(term.lora_B), windows_moved(term.window)
        )
        for term in value.terms
    )
    gain = value.gain and value.gain.rearranged(factor_moved(value.gain.aligned))
    return Factored(base, terms, gain)
