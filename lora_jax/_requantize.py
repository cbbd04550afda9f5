"""Merging into quantised weights, and what that costs: the sum is rounded to the base's format."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_jax._compat import is_tracer
from lora_jax._dtypes import epsilon
from lora_jax._matrices import by_matrix, stack_ndim
from lora_jax._nodes import NodeIndex, check_single
from lora_jax._partition import Partition, cut_as, uncut
from lora_jax._values import as_array, requantized_value, value_of_part
from lora_jax._weight import LoRAWeight, innermost_base, is_lora_weight
from lora_jax.quantization._encode import is_written, requantized
from lora_jax.quantization._weight import QuantizedWeight, is_quantized

# How many weights a warning names.
_MOST_NAMED = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RequantizationError:
    r"""What quantising the sum of a quantised weight and its adapter's change costs.

    With the weight $W$, the sum $W' = W + \Delta$ and its quantised form $Q$, in Frobenius norms:

    Attributes:
      error: $\lVert Q - W' \rVert / \lVert W' \rVert$, how much the rounding changes.
      change: $\lVert \Delta \rVert / \lVert W' \rVert$, how much the adapter changes.
      kept: $\langle Q - W, \Delta \rangle / \lVert \Delta \rVert^2$, the share of the adapter's
        change that is in $Q$: 1 where it is kept, 0 where it is lost.
    """

    error: Float[Array, ""] | float
    change: Float[Array, ""] | float
    kept: Float[Array, ""] | float

    def __str__(self) -> str:
        return (
            f"rounding changes it by {100 * float(self.error):.2g} %, the adapter by "
            f"{100 * float(self.change):.2g} %, of which {100 * float(self.kept):.0f} % is kept"
        )


class RequantizationWarning(UserWarning):
    """Merging rounded weights to the format of their bases, which loses a part of the adapters.

    Attributes:
      errors: the `RequantizationError` of each weight by its path.
    """

    errors: Mapping[str, RequantizationError]

    def __init__(self, errors: Mapping[str, RequantizationError]) -> None:
        self.errors = errors
        worst = sorted(errors, key=lambda path: float(errors[path].kept))
        lines = [f"'{path}': {errors[path]}" for path in worst[:_MOST_NAMED]]
        left = len(worst) - len(lines)
        more = [f"and {left} more, in the attribute `errors` of this warning"] if left else []
        super().__init__(
            "merge(wrapped, requantize=True) rounds each sum to the format of its base; "
            "merge(wrapped) keeps it, as an array.\n" + ";\n".join([*lines, *more]) + "."
        )


def requantization_errors(wrapped: Any) -> dict[str, RequantizationError]:
    """Returns what `merge(wrapped, requantize=True)` would lose, for each weight by its path.

    It works under `jit` too, where `merge` can't warn.

    Args:
      wrapped: what `wrap` returned for a tree with quantised weights, trained or not.

    Returns:
      The errors of the adapted weights whose bases are quantised.

    Raises:
      ValueError: a base has a format that is only read, or is another library's.

    Examples:
      >>> import jax, jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (128, 64))}
      >>> wrapped = lora_jax.wrap(lora_jax.quantize(params, "kernel"), "kernel", rank=2)
      >>> errors = lora_jax.requantization_errors(wrapped)["kernel"]
      >>> errors.change, errors.error < 0.01
      (0.0, True)
    """
    return errors_of(quantized_nodes(NodeIndex.of(wrapped).nodes.items()))


def quantized_nodes(nodes: Iterable[tuple[str, Any]]) -> dict[str, LoRAWeight]:
    """Returns those nodes whose bases can be quantised again, by path.

    Raises:
      ValueError: a base has a format that is only read, or is another library's.
    """
    found = {}
    for path, node in nodes:
        base = innermost_base(node)
        if not is_quantized(base):
            continue
        check_single(path, node)
        if not isinstance(base, QuantizedWeight) or not is_written(base):
            kind = base.format if isinstance(base, QuantizedWeight) else type(base.array).__name__
            raise ValueError(
                f"'{path}' has a base of the format {kind}, to which nothing can be quantised; "
                "merge(wrapped) returns the sum as an array, which quantize(params, targets) takes."
            )
        found[path] = node
    return found


def errors_of(nodes: Mapping[str, LoRAWeight]) -> dict[str, RequantizationError]:
    """Returns the errors of nodes on quantised bases, as numbers where they are known."""
    errors = {path: _error(node) for path, node in nodes.items()}
    return {
        path: each if is_tracer(each.error) else jax.tree.map(float, each)
        for path, each in errors.items()
    }


def requantized_sum(node: LoRAWeight) -> QuantizedWeight:
    """Returns the value of a node, quantised as the weight at its bottom is."""
    base = innermost_base(node)
    if is_lora_weight(node.base):
        return requantized(as_array(node), base)
    return requantized_value(node)


def _error(node: LoRAWeight) -> RequantizationError:
    stack = stack_ndim(node.base, node.axes)
    partition = Partition.of(innermost_base(node))
    sharding = None if partition is None else uncut(partition.mesh)
    sums = cut_as(sharding, functools.partial(_squared_sizes, stack=stack), node)
    lost, added, size, common = sums
    size = jnp.where(size == 0, 1, size)
    # A change that is below the rounding of the sum is none: what is left of it is noise.
    is_changed = added > (4 * epsilon(jnp.float32)) ** 2 * size
    return RequantizationError(
        error=jnp.sqrt(lost / size),
        change=jnp.where(is_changed, jnp.sqrt(added / size), 0),
        kept=jnp.where(is_changed, common / jnp.where(is_changed, added, 1), 1),
    )


@functools.partial(jax.jit, static_argnames="stack")
def _squared_sizes(node: LoRAWeight, *, stack: int) -> tuple[Array, ...]:
    """Returns ‖Q - W'‖², ‖Δ‖², ‖W'‖² and ⟨Q - W, Δ⟩ over the adapted part of a weight."""
    axes, like = node.axes, innermost_base(node)

    def of_part(
        part: Array, lora_A: Array, lora_B: Array, magnitude: Any, moved: Any
    ) -> tuple[Array, ...]:
        one = jnp.ones((), jnp.float32)
        before = part.astype(jnp.float32)
        if moved is not None:
            before = value_of_part(part, moved[0], moved[1], one, None, axes)
        after = value_of_part(part, lora_A, lora_B, node.scale, magnitude, axes)
        codes = requantized(after, like, at_once=not stack)
        rounded = dataclasses.replace(codes, dtype_name="float32").dequantize()
        change = after - before
        products = (rounded - after) ** 2, change**2, after**2, (rounded - before) * change
        front = (1,) * stack
        return tuple(jnp.sum(each).reshape(front) for each in products)

    moved = None if node.initial_A is None else (node.initial_A, node.initial_B)
    base = as_array(node.base) if is_lora_weight(node.base) else node.base
    arrays = (node.lora_A, node.lora_B, node.magnitude, moved)
    sums = by_matrix(of_part, stack, base, axes, node.layers, *arrays)
    return tuple(jnp.sum(each) for each in sums)
