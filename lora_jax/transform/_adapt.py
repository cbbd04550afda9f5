"""`adapt`: from a function of parameters to one that takes the wrapped tree."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lora_jax._compat import ClosedJaxpr, evaluate
from lora_jax._paths import path_string
from lora_jax._weight import FullWeight, LoRAWeight, is_adapter_node, map_adapter_nodes
from lora_jax.transform._factored import Factored, factored_weight
from lora_jax.transform._interpreter import Interpreter
from lora_jax.transform._report import OnMaterialize, Use
from lora_jax.transform._rules import RULES


def adapt(fn: Callable[..., Any], *, on_materialize: OnMaterialize = "warn") -> Callable[..., Any]:
    r"""Returns `fn` as a function of wrapped parameters, with no change to its code.

    Wherever `fn` uses an adapted weight $W$, the result is what it would be with $W + s \cdot A B$;
    a contraction $x W$ becomes $x W + s\,(x A) B$, and the sum is never built. The result
    differentiates, jits, vmaps, scans, remats and shards as `fn` does. `base` and `scale` receive
    no gradient.

    Args:
      fn: any JAX function; `model.apply`, a bound method, a loss. Where no argument holds an
        adapter, it is called as it is. Otherwise it is traced once for each structure, shape and
        dtype of its arguments, and arguments that are not arrays are static.
      on_materialize: what to do at an op that no rule covers, where W + AB must be built: `"warn"`
        (a `MaterializationWarning` that names path, op and source line), `"error"`, `"ignore"`.

    Returns:
      A function of the same arguments, in which `LoRAWeight` nodes may sit anywhere.

    Raises:
      ValueError: `on_materialize` is none of the three.
      MaterializationError: when called, under `on_materialize="error"`.

    Example:
      >>> import jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> apply = lambda params, x: x @ params["kernel"]
      >>> wrapped = lora_jax.wrap(params, "kernel", rank=2)
      >>> lora_jax.adapt(apply)(wrapped, jnp.ones((1, 4))).tolist()
      [[4.0, 4.0, 4.0]]
    """
    if on_materialize not in ("warn", "error", "ignore"):
        raise ValueError(
            f"`on_materialize` is {on_materialize!r}; expected 'warn', 'error' or 'ignore'."
        )
    rewritten = functools.partial(_rewritten, fn, on_materialize)

    @functools.wraps(fn)
    def adapted(*args: Any, **kwargs: Any) -> Any:
        arguments = map_adapter_nodes(
            lambda node: node.value if isinstance(node, FullWeight) else node, (args, kwargs)
        )
        if not any(isinstance(leaf, LoRAWeight) for leaf in _leaves(arguments)):
            args, kwargs = arguments
            return fn(*args, **kwargs)
        closed_jaxpr, output = jax.make_jaxpr(rewritten, return_shape=True)(_with_static(arguments))
        values = evaluate(closed_jaxpr, jax.tree.leaves(_with_static(arguments)))
        return _without_static(jax.tree.unflatten(jax.tree.structure(output), values))

    return adapted


def _rewritten(
    fn: Callable[..., Any], on_materialize: OnMaterialize, arguments: Any
) -> Any:
    """Returns the outputs of `fn` on arguments that hold `LoRAWeight` nodes."""
    return rewrite(fn, on_materialize, arguments, [])


def rewrite(
    fn: Callable[..., Any], on_materialize: OnMaterialize, arguments: Any, uses: list[Use]
) -> Any:
    """Returns the outputs of `fn`, and notes in `uses` what happened at each adapted weight."""
    flat, structure = jax.tree_util.tree_flatten_with_path(
        arguments, is_leaf=lambda node: isinstance(node, LoRAWeight)
    )
    leaves = [leaf for _, leaf in flat]
    paths = [path_string(key_path[2:]) for key_path, _ in flat]
    traced = traced_function(fn, structure, [_stand_in(leaf) for leaf in leaves])
    interpreter = Interpreter(RULES, on_materialize, uses, {})
    values = [
        factored_weight(leaf, path) if isinstance(leaf, LoRAWeight) else leaf
        for leaf, path in zip(leaves, paths, strict=True)
    ]
    outputs = [
        interpreter.materialized_value(value, "the output", "the end of the function")
        if isinstance(value, Factored)
        else value
        for value in interpreter.run(traced.closed_jaxpr, values)
    ]
    return jax.tree.unflatten(traced.output_structure, outputs)


@dataclasses.dataclass(frozen=True)
class TracedFunction:
    """A function's jaxpr, and the structure of what it returns."""

    closed_jaxpr: ClosedJaxpr
    output_structure: Any


def traced_function(
    fn: Callable[..., Any], structure: Any, leaves: Sequence[Any]
) -> TracedFunction:
    """Returns the jaxpr of `fn` for arguments (args, kwargs) of this structure and these leaves."""

    def flat(*leaves: Any) -> Any:
        args, kwargs = _without_static(jax.tree.unflatten(structure, leaves))
        return _with_static(fn(*args, **kwargs))

    closed_jaxpr, output = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    return TracedFunction(closed_jaxpr, jax.tree.structure(output))


def _stand_in(leaf: Any) -> Any:
    """Returns what `fn` is traced with in place of a leaf: a plain weight of the base's shape."""
    if not isinstance(leaf, LoRAWeight):
        return leaf
    return leaf.base


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """A leaf that is no array, as a part of the tree's structure."""

    value: Any

    def __hash__(self) -> int:
        try:
            return hash(self.value)
        except TypeError:
            return id(self.value)

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, _Static) or type(self.value) is not type(other.value):
            return False
        return self.value is other.value or bool(self.value == other.value)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=is_adapter_node)


def _with_static(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf if _is_array(leaf) else _Static(leaf), tree)


def _without_static(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: leaf.value if isinstance(leaf, _Static) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, _Static),
    )
