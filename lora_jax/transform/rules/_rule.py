"""What a rule is: all that is done at one primitive when an adapted weight reaches it."""

import dataclasses

from lora_jax.transform._interpreter import Evaluation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """What is done at a primitive, in each interpretation of a jaxpr.

    Each of the three is a function `(interpreter, equation, inputs) -> outputs`. It is called when
    at least one input is a `Factored` value and returns the equation's outputs, arrays or
    `Factored`; or None where it doesn't cover the case at hand, and then W + AB is built.

    Attributes:
      factors: `adapt`: what the primitive computes with factors.
      roles: `infer_axes`: which roles it gives to a weight's axes, and where it moves them; as
        `factors` moves them unless given.
      rows: `input_moments`: which rows a weight is multiplied by; as with `factors` unless given.
    """

    factors: Evaluation
    roles: Evaluation | None = None
    rows: Evaluation | None = None
