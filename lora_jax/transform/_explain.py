"""`explain`: where each adapted weight is used, how that is computed, and at what cost."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lora_jax._nodes import levels_of
from lora_jax._row_selection import rows_text, selects_rows
from lora_jax._shapes import Axes, Size, layers_shape, side_size
from lora_jax._tables import table
from lora_jax._weight import LoRAWeight, innermost_base, is_lora_weight
from lora_jax.quantization._weight import format_of
from lora_jax.transform._adapt import rewrite, unbound, weight_paths, with_trained_values
from lora_jax.transform._dropout import NoDropout
from lora_jax.transform._report import Use
from lora_jax.transform._static import with_static


@dataclasses.dataclass(frozen=True)
class TargetReport:
    """How a call uses one adapted weight.

    Attributes:
      path: the weight's path in the arguments.
      shape: the weight's shape.
      axes: the role of each axis.
      rank: r; for an adapter of single rows, how many they are.
      uses: where it is used; empty if the function does nothing with it.
      format: the format of a quantised base, which stands beside the shape; None for an array.
      selects_rows: whether the adapter changes single rows.
    """

    path: str
    shape: tuple[Size, ...]
    axes: Axes
    rank: int
    uses: tuple[Use, ...]
    format: str | None = None
    selects_rows: bool = False


@dataclasses.dataclass(frozen=True)
class Report:
    """How one call uses each adapted weight; printed, it is a table.

    Attributes:
      targets: a report for each adapted weight, in the order of the arguments.
    """

    targets: tuple[TargetReport, ...]

    @property
    def unused(self) -> tuple[str, ...]:
        """The paths of adapters that the function never uses."""
        return tuple(target.path for target in self.targets if not target.uses)

    @property
    def materialized(self) -> tuple[Use, ...]:
        """The uses for which no rule exists, so that W + AB is built."""
        return tuple(
            use for target in self.targets for use in target.uses if use.how == "materialized"
        )

    @property
    def added_flops(self) -> Size:
        """The FLOPs that all adapters add to one forward pass."""
        return sum(use.added_flops * use.times for target in self.targets for use in target.uses)

    def __str__(self) -> str:
        rows = [row for target in self.targets for row in _rows(target)]
        warning = "".join(
            f"\n'{path}' is never used: its adapter does nothing." for path in self.unused
        )
        return (
            f"{table(_HEADER, rows, right=('times', 'base FLOPs', 'factored', 'dense'))}{warning}"
        )


_HEADER = (
    "path",
    "shape",
    "axes",
    "rank",
    "used in",
    "how",
    "times",
    "base FLOPs",
    "factored",
    "dense",
    "source",
)


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Returns where each adapted weight is used, how that is computed, and at what cost.

    The function is traced, not run. Costs are the FLOPs of one forward pass: those of the base op,
    and those that the adapter adds with factored products or with W + AB built. The norm of a DoRA
    weight has a row of its own, since all uses of the weight share it.

    Args:
      fn: the function as its author wrote it, not adapted.
      *args: its arguments, with wrapped parameters among them.
      **kwargs: its keyword arguments.

    Returns:
      The report: data, and a table when printed. `how` is "factored" for x W + s (x A) B; "merged"
      where a training step takes fewer FLOPs with W + AB built in each direction, and with the
      gradients of A and B as before; "dense" where it takes fewer with W + AB built and its
      gradient; "materialized" where no rule covers the op.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jnp.ones((40, 30)), "idle": jnp.ones((9, 9))}
      >>> wrapped = lora_jax.wrap(params, ".*", rank=1)
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> report = lora_jax.explain(fn, wrapped, jnp.ones((2, 40)))
      >>> report.unused, report.added_flops
      (('idle',), 280)
    """
    function, (bound_args, bound_kwargs) = unbound(fn)
    args, kwargs = (*bound_args, *args), {**bound_kwargs, **kwargs}
    arguments = with_static(with_trained_values((args, kwargs)))
    uses: list[Use] = []
    jax.eval_shape(
        lambda arguments: rewrite(function, arguments, recorder=uses.append, dropout=NoDropout()),
        arguments,
    )
    return Report(
        tuple(
            TargetReport(
                path=path,
                shape=node.shape,
                axes=node.axes,
                rank=node.rank,
                uses=_with_norm(path, node, _gathered([use for use in uses if use.path == path])),
                format=format_of(innermost_base(node)),
                selects_rows=selects_rows(node),
            )
            for path, node in _adapted_weights(arguments)
        )
    )


def _adapted_weights(arguments: Any) -> list[tuple[str, LoRAWeight]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(arguments, is_leaf=is_lora_weight)
    return [
        (path, node)
        for top, (_, leaf) in zip(weight_paths(flat), flat, strict=True)
        if is_lora_weight(leaf)
        for path, node in levels_of(top, leaf)
        if is_lora_weight(node)
    ]


def _with_norm(path: str, node: LoRAWeight, uses: tuple[Use, ...]) -> tuple[Use, ...]:
    """Returns the uses of a weight; for DoRA, with the norm that they share in front.

    The norm takes the products WᵀA, G = AᵀA and GB, and the sums of B ∘ WᵀA and B ∘ GB over r.
    """
    if not uses or node.magnitude is None:
        return uses
    shape = layers_shape(node.shape, node.axes, node.layers)
    size, rank = math.prod(shape), node.rank
    batch, inputs, outputs = (side_size(shape, node.axes, role) for role in ("batch", "in", "out"))
    products = size + batch * rank * (inputs + outputs)
    factored = 2 * rank * products + 4 * rank * batch * outputs
    dense = (2 * rank + 1) * size + 2 * size  # the built weight is squared and summed
    return (Use(path, "norm", "", "factored", 0, factored, dense), *uses)


def _gathered(uses: Sequence[Use]) -> tuple[Use, ...]:
    """Returns the uses with equal ones merged, their counts added."""
    times: dict[Use, int] = {}
    for use in uses:
        once = dataclasses.replace(use, times=1)
        times[once] = times.get(once, 0) + use.times
    return tuple(dataclasses.replace(use, times=count) for use, count in times.items())


def _rows(target: TargetReport) -> list[tuple[str, ...]]:
    shape = str(target.shape) if target.format is None else f"{target.shape} {target.format}"
    rank = rows_text(target.rank) if target.selects_rows else str(target.rank)
    described = (target.path, shape, ", ".join(target.axes), rank)
    if not target.uses:
        return [(*described, "nowhere", "", "0", "", "", "", "")]
    return [
        (
            *described,
            use.primitive,
            use.how,
            str(use.times),
            _count(use.base_flops),
            "" if use.factored_flops is None else f"+{_count(use.factored_flops)}",
            f"+{_count(use.dense_flops)}",
            use.source,
        )
        for use in target.uses
    ]


def _count(flops: Any) -> str:
    """Returns a number of operations as text; with symbolic shapes, a polynomial."""
    return f"{flops:,}" if isinstance(flops, int) else str(flops)
