"""What a rule is: how one primitive is evaluated when an adapted weight reaches it."""

import dataclasses

from lora_jax.transform._interpreter import Evaluation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """How a primitive is evaluated, in each interpretation of a jaxpr.

    Each of the three is a function `(interpreter, equation, inputs) -> outputs`. It is called when
    at least one input is a `Factored` value and returns the equation's outputs, arrays or
    `Factored`. It returns None for a case that it doesn't cover; then W + AB is built.

    Attributes:
      factors: `adapt`: what the primitive computes with factors.
      roles: `infer_axes`: which roles it gives to a weight's axes, and where it moves them; as
        `factors` moves them unless given.
      rows: `input_moments`: which rows a weight is multiplied by; as with `factors` unless given.
    """

    factors: Evaluation
    roles: Evaluation | None = None
    rows: Evaluation | None = None
