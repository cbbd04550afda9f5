"""Which rule covers which primitive.

A rule is a function `(interpreter, equation, inputs) -> outputs`. It is called when at least one
input is a `Factored` value and returns the equation's outputs, arrays or `Factored`; or None where
it doesn't cover the case at hand, and then W + AB is built. A new rule is one function and one row.
"""

from collections.abc import Mapping

from lora_jax.transform import (
    _arithmetic,
    _collective,
    _contraction,
    _control,
    _convolution,
    _custom,
    _indexing,
    _parts,
    _placement,
    _structure,
)
from lora_jax.transform._interpreter import Rule

RULES: Mapping[str, Rule] = {
    **_structure.RULES,
    **_parts.RULES,
    **_arithmetic.RULES,
    **_placement.RULES,
    **_contraction.RULES,
    **_convolution.RULES,
    **_indexing.RULES,
    **_control.RULES,
    **_custom.RULES,
    **_collective.RULES,
}
