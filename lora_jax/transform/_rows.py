r"""What `input_moments` sees of the inputs of each weight: the rows x that it is multiplied by.

Each weight carries a probe $P = [I, 0]$ in the place of lora_A, with in + 1 columns. Where the
model multiplies x by the weight, $h = x P = [x, 0]$ is computed beside it, and what comes back to
$h$ in the backward pass is set to $[x, 1]$, whatever the loss. The gradient of P is then
$\sum x^\top [x, 1] = [\sum x^\top x, \sum x^\top]$, summed over all uses, and apart for each place
of a batch axis. A second probe of ones in the place of lora_B receives 1 for each row, and counts
them. Where weights are joined, it also says which rows are a weight's own, being 0 outside of the
term's window.
"""

from typing import Any

import jax
from jaxtyping import Array


@jax.custom_vjp
def recorded(result: Array, hidden: Array, counter: Array) -> Array:
    """Returns `result`; backwards, gives [x, 1] to hidden = [x, 0] and 1 for each row.

    A row that isn't the weight's own has a counter of 0, and gives nothing.

    Args:
      result: what the op gives.
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
