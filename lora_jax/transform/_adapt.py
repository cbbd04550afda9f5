"""`adapt`: from a function of parameters to one that takes the wrapped tree."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from lora_jax._compat import ClosedJaxpr, evaluate
from lora_jax._paths import path_strings
from lora_jax._weight import FullWeight, is_lora_weight, map_adapter_nodes
from lora_jax.transform._dropout import Dropout
from lora_jax.transform._factored import Factored, factored_weight
from lora_jax.transform._interpreter import Interpreter
from lora_jax.transform._report import OnMaterialize, Use
from lora_jax.transform._rules import RULES


def adapt(
    fn: Callable[..., Any], *, on_materialize: OnMaterialize = "warn", dropout: float = 0.0
) -> Callable[..., Any]:
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
      dropout: the probability with which an element of an adapter's input is dropped, with an
        independent mask for each use. It is on in calls that bring `lora_key=`, a random key, and
        off in all others, so that evaluation needs no second function. Functions with a derivative
        rule of their own are left out of it.

    Returns:
      A function of the same arguments, in which `LoRAWeight` nodes may sit anywhere, and of
      `lora_key`.

    Raises:
      ValueError: `on_materialize` or `dropout` is out of range; or, when called, `lora_key` is
        given without `dropout`.
      MaterializationError: when called, under `on_materialize="error"`.

    Examples:
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
    if not 0 <= dropout < 1:
        raise ValueError(f"`dropout` is {dropout!r}; expected a probability from 0 to below 1.")

    def rewritten(arguments: Any, lora_key: PRNGKeyArray | None) -> Any:
        masks = None if lora_key is None else Dropout(dropout, lora_key)
        return rewrite(fn, arguments, on_materialize=on_materialize, dropout=masks, uses=[])

    @functools.wraps(fn)
    def adapted(*args: Any, lora_key: PRNGKeyArray | None = None, **kwargs: Any) -> Any:
        if lora_key is not None and dropout == 0:
            raise ValueError("`lora_key` is given, but dropout is 0; call adapt(fn, dropout=0.1).")
        arguments = with_trained_values((args, kwargs))
        if not any(
            is_lora_weight(leaf) for leaf in jax.tree.leaves(arguments, is_leaf=is_lora_weight)
        ):
            args, kwargs = arguments
            return fn(*args, **kwargs)
        inputs = with_static(arguments), lora_key
        closed_jaxpr, output = jax.make_jaxpr(rewritten, return_shape=True)(*inputs)
        values = evaluate(closed_jaxpr, jax.tree.leaves(inputs))
        return without_static(jax.tree.unflatten(jax.tree.structure(output), values))

    return adapted


def rewrite(
    fn: Callable[..., Any],
    arguments: Any,
    *,
    uses: list[Use],
    on_materialize: OnMaterialize = "ignore",
    dropout: Dropout | None = None,
) -> Any:
    """Returns the outputs of `fn` on (args, kwargs) that hold `LoRAWeight` nodes.

    Args:
      fn: the function as its author wrote it.
      arguments: (args, kwargs), with leaves that are no arrays made static.
      uses: takes a note of what happened at each equation that an adapted weight reached.
      on_materialize: what to do where no rule covers an op.
      dropout: LoRA dropout, or None.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(arguments, is_leaf=is_lora_weight)
    leaves = [leaf for _, leaf in flat]
    paths = weight_paths(flat)
    plain = [leaf.base if is_lora_weight(leaf) else leaf for leaf in leaves]
    traced = traced_function(fn, structure, plain)
    interpreter = Interpreter(RULES, on_materialize, uses, {}, dropout)
    values = [
        factored_weight(leaf, path) if is_lora_weight(leaf) else leaf
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
        args, kwargs = without_static(jax.tree.unflatten(structure, leaves))
        return with_static(fn(*args, **kwargs))

    closed_jaxpr, output = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    return TracedFunction(closed_jaxpr, jax.tree.structure(output))


def weight_paths(flat: Sequence[tuple[Any, Any]]) -> list[str]:
    """Returns the path of each leaf within its argument, or with it where another has the same."""
    key_paths = [key_path for key_path, _ in flat]
    within, whole = path_strings(key_paths, skip=2), path_strings(key_paths, skip=1)
    adapted = collections.Counter(
        path for path, (_, leaf) in zip(within, flat, strict=True) if is_lora_weight(leaf)
    )
    return [
        longer if adapted[path] > 1 else path for path, longer in zip(within, whole, strict=True)
    ]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """A leaf that is no array, as a part of the tree's structure."""

    value: Any

    def __hash__(self) -> int:
        return hash(self.value) if _is_hashable(self.value) else id(self.value)

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, _Static) or type(self.value) is not type(other.value):
            return False
        # What can't be hashed may have changed since: it equals nothing, and is traced anew.
        return _is_hashable(self.value) and bool(self.value == other.value)


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def with_trained_values(tree: Any) -> Any:
    """Returns the tree with the trained copy in place of each weight that trains in full."""
    return map_adapter_nodes(
        lambda node: node.value if isinstance(node, FullWeight) else node, tree
    )


def with_static(tree: Any) -> Any:
    return jax.tree.map(_array_or_static, tree, is_leaf=is_lora_weight)


def _array_or_static(leaf: Any) -> Any:
    if is_lora_weight(leaf):
        return jax.tree.map(lambda each: each if _is_array(each) else jnp.asarray(each), leaf)
    return leaf if _is_array(leaf) else _Static(leaf)


def without_static(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: leaf.value if isinstance(leaf, _Static) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, _Static),
    )
