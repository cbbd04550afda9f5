r"""How `input_moments` sees the inputs of each weight: the rows x that it is multiplied by.

Each weight carries a probe $P = [I, 0]$ in place of lora_A, with in + 1 columns. Where the model
multiplies x by the weight, $h = x P = [x, 0]$ is computed beside it, and the cotangent of $h$ in
the backward pass is set to $[x, 1]$, whatever the loss. The gradient of P is then
$\sum x^\top [x, 1] = [\sum x^\top x, \sum x^\top]$, summed over all uses, but separately for each
index of a batch axis. A second probe, of ones in place of lora_B, receives 1 for each row and so
counts the rows. Where weights are joined, it is 0 outside of the term's window, and so also says
which rows belong to a weight.
"""

from typing import Any

import jax
from jaxtyping import Array


@jax.custom_vjp
def recorded(result: Array, hidden: Array, counter: Array) -> Array:
    """Returns `result`; backwards, gives [x, 1] to hidden = [x, 0] and 1 for each row.

    A row that doesn't belong to the weight has a counter of 0, and adds nothing.

    Args:
      result: the op's output.
      hidden: the op's input times the probe P, of shape (*rows, in + 1).
      counter: the probe of ones at each row (*rows,).
    """
    del hidden, counter
    return result


def _forward(result: Array, hidden: Array, counter: Array) -> tuple[Array, Any]:
    rows = (hidden * counter[..., None]).at[..., -1].set(counter)
    return result, (rows, counter)


def _backward(saved: Any, cotangent: Array) -> tuple[Array, Array, Array]:
    return cotangent, *saved


recorded.defvjp(_forward, _backward)
