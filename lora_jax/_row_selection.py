"""Which rows of a weight an adapter changes: a one-hot lora_A that is never built."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lora_jax._serialization import exportable, introduce_to_flax


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSelection:
    r"""The lora_A of an adapter that changes single rows of a weight, such as those of new tokens.

    It stands for the matrix $E$ of shape (in, n) with $E_{ik} = 1$ where $i$ is row $k$, and 0
    elsewhere, so that $W + E B$ is $W$ with $B_k$ added to row $k$. It has the shape of $E$, and
    holds the numbers of the rows alone.

    Attributes:
      rows: the numbers of the rows, of shape (n,), each of them once. Other rows, as many, can be
        put in their place without compiling again.
      size: in, the size of the axis that the rows are of.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> wrapped = lora_jax.wrap({"table": jnp.ones((6, 3))}, {"table": dict(rows=[4, 1])})
      >>> selection = wrapped["table"].lora_A
      >>> selection.rows.tolist(), selection.shape
      ([4, 1], (6, 2))
      >>> selection.one_hot().tolist()[4]
      [1.0, 0.0]
    """

    rows: Int[Array, " n"] | Any
    size: int = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        introduce_to_flax(type(self))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (in, n) of the matrix that it stands for."""
        return (*self.rows.shape[:-1], self.size, self.rows.shape[-1])

    @property
    def ndim(self) -> int:
        """The number of axes of that matrix."""
        return self.rows.ndim + 1

    def one_hot(self, dtype: Any = jnp.float32) -> Float[Array, "..."]:
        """Returns the matrix as an array, which nothing in the library needs."""
        return jax.nn.one_hot(self.rows, self.size, dtype=dtype, axis=-2)


def selects_rows(node: Any) -> bool:
    """Says whether a node changes single rows of its weight."""
    return isinstance(getattr(node, "lora_A", None), RowSelection)


def rows_text(count: int) -> str:
    """Returns a number of rows in words."""
    return "1 row" if count == 1 else f"{count} rows"
