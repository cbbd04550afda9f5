"""What `wrap` adapts and what it trains in full: `targets`, `exclude` and `train` together."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lora_jax._axes import InferredAxes, axes_of, check_axes
from lora_jax._dtypes import is_narrow_float
from lora_jax._leaf_kinds import Neighbourhood, floating_obstacle, weight_obstacle
from lora_jax._nodes import NodeIndex, check_plain
from lora_jax._paths import leaves_with_paths, listed
from lora_jax._shapes import Axes
from lora_jax._targets import Selection, Targets, check_no_overrides, select
from lora_jax._weight import AdapterNode
from lora_jax.quantization._weight import AnyWeight, format_of, is_quantized


@dataclasses.dataclass(frozen=True)
class SelectedWeight:
    """A weight that is to be adapted.

    Attributes:
      leaf: the weight, or a node that `wrap` made of it.
      axes: the role of each of its axes.
      selection: how it was selected.
    """

    leaf: AnyWeight | AdapterNode
    axes: Axes
    selection: Selection


def selected_weights(
    params: Any,
    targets: Targets,
    *,
    exclude: Targets | None = None,
    axes: Mapping[str, Sequence[str]] | None = None,
    may_be_wrapped: bool = False,
) -> dict[str, SelectedWeight]:
    """Returns the weights to adapt by path.

    Args:
      params: the parameters.
      targets: what to adapt.
      exclude: what of it not to adapt.
      axes: the roles of the weights' axes.
      may_be_wrapped: whether `params` may hold nodes that `wrap` made; each is a weight then.

    Raises:
      ValueError: `params` is wrapped already; `targets`, `exclude` or `axes` does not fit; or a
        selected leaf may be a bias, or a part of a quantised weight.
    """
    if not may_be_wrapped:
        check_not_wrapped(params)
    index = NodeIndex.of(params)
    plain = index.mapped(lambda _, node: jax.ShapeDtypeStruct(node.shape, node.dtype))
    check_axes(axes, plain)
    inferred = axes if isinstance(axes, InferredAxes) else None
    leaves = dict(leaves_with_paths(plain))
    weights = dict(index.tree.items())
    return {
        path: SelectedWeight(weights[path], axes_of(path, leaves[path], axes), selection)
        for path, selection in _selected(plain, leaves, targets, exclude, inferred).items()
    }


def _selected(
    params: Any,
    leaves: Mapping[str, Any],
    targets: Targets,
    exclude: Targets | None,
    inferred: InferredAxes | None,
) -> dict[str, Selection]:
    neighbourhood = Neighbourhood.of(leaves.items())

    def obstacle(path: str, leaf: Any, named: bool) -> str | None:
        reason = weight_obstacle(leaf)
        if reason is not None:
            return reason
        if inferred is not None:
            return _obstacle_to_function(path, inferred)
        if not named and neighbourhood.kind_by_name(path, leaf) == "bias":
            return "it is a bias, which a matched module does not mean; its own name does"
        return None

    selected = select(
        params,
        targets,
        obstacle=obstacle,
        expected="a floating-point weight of two or more axes"
        + ("" if inferred is None else " that the function uses as one"),
        inferred=inferred,
    )
    kept = _without_excluded(params, selected, exclude)
    for path, selection in kept.items():
        if inferred is None and not selection.names_leaf:
            _check_no_bias(path, leaves[path], neighbourhood)
        if inferred is None or not _is_multiplied(path, inferred):
            _check_not_quantised(path, leaves[path], neighbourhood)
    return kept


def trained_leaves(params: Any, train: Targets | None, adapted: Mapping[str, Any]) -> set[str]:
    """Returns the paths of what trains in full.

    Raises:
      ValueError: `train` does not fit.
    """
    if train is None:
        return set()

    def obstacle(path: str, leaf: Any, named: bool) -> str | None:
        if path in adapted:
            return "`targets` selects it"
        if is_quantized(leaf):
            return (
                f"it is quantised as {format_of(leaf)}, and steps are smaller than its codes tell "
                "apart; leave it as it is with quantize(..., exclude=...), or train "
                "quantization.dequantize(params)"
            )
        reason = floating_obstacle(leaf)
        if reason is None and is_narrow_float(leaf.dtype):
            return f"its dtype is {leaf.dtype}, too narrow for training steps; cast it before"
        return reason

    trained = select(
        params,
        train,
        obstacle=obstacle,
        argument="train",
        expected="a floating-point array that `targets` does not select",
    )
    check_no_overrides(trained, "train", "what is trained in full")
    return set(trained)


def check_not_wrapped(params: Any) -> None:
    """Raises if `params` holds a node that `wrap` made."""
    check_plain(
        params,
        "wrap(unwrap(params), ...) starts anew, wrap(merge(params), ...) adapts the merged "
        "weights, and wrap(params, {...: dict(rows=...)}) adds rows.",
        ValueError,
    )


def _obstacle_to_function(path: str, inferred: InferredAxes) -> str | None:
    # A weight whose uses disagree is kept here: skipping it would hide the disagreement.
    if path in inferred or path in inferred.disagreements:
        return None
    return inferred.reason_against(path)


def _is_multiplied(path: str, inferred: InferredAxes) -> bool:
    return any(use.is_product for use in inferred.uses[path])


def _without_excluded(
    params: Any, selected: Mapping[str, Selection], exclude: Targets | None
) -> dict[str, Selection]:
    if exclude is None:
        return dict(selected)
    excluded = select(
        params,
        exclude,
        obstacle=lambda path, leaf, named: (
            None if path in selected else "`targets` does not select it anyway"
        ),
        argument="exclude",
        expected="a leaf that `targets` selects",
    )
    check_no_overrides(excluded, "exclude", "what is excluded")
    kept = {path: selection for path, selection in selected.items() if path not in excluded}
    if not kept:
        raise ValueError(
            f"`exclude` leaves nothing of what `targets` selects: {listed(sorted(selected))}."
        )
    return kept


def _check_no_bias(path: str, leaf: Any, neighbourhood: Neighbourhood) -> None:
    if neighbourhood.kind_by_name(path, leaf) == "unclear":
        raise ValueError(
            f"`targets` matches the module of '{path}' of shape {leaf.shape}, which by its name is "
            "a bias, and by what stands beside it may be a weight. Name it in `targets` to adapt "
            f"it: wrap(..., [..., '{path}']); leave it out with wrap(..., exclude='{path}'); or "
            "let axes=infer_axes(fn, params, ...) tell."
        )


def _check_not_quantised(path: str, leaf: Any, neighbourhood: Neighbourhood) -> None:
    partner = neighbourhood.quantised_partner(path, leaf)
    if partner is not None:
        raise ValueError(
            f"`targets` matches '{path}' of shape {leaf.shape} and dtype {leaf.dtype}, which "
            f"together with {partner!r} beside it is a quantised weight; adapting one part of it "
            "does not adapt the weight. Put one weight in place of them: "
            "lora_jax.QuantizedWeight(codes=..., scales=..., format='int8', block=..., "
            "blocked_shape=(inputs,)), or for arrays of another library, such as Qwix's, what "
            "quantization.declare(params, QArray, dequantize=qwix.dequantize) returns; or leave it "
            f"as it is with wrap(..., exclude='{path}')."
        )
