"""What is cheap to compute and large to keep: the backward pass computes it again."""

from collections.abc import Callable
from typing import TypeVar

import jax

Function = TypeVar("Function", bound=Callable[..., jax.Array])


def computed_again(function: Function) -> Function:
    """Returns a function whose arguments, and nothing else, are kept for its backward pass."""
    # Within the scan over layers nothing needs protection from being merged with the forward pass.
    return jax.checkpoint(function, prevent_cse=False)
