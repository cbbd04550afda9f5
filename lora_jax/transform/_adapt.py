"""`adapt`: from a function of parameters to one that takes the wrapped tree."""

import collections
import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from lora_jax._compat import ClosedJaxpr, evaluate
from lora_jax._nodes import map_nodes
from lora_jax._paths import path_strings
from lora_jax._weight import FullWeight, has_factors, innermost_base, is_node, is_weight
from lora_jax.transform._bases import stand_in
from lora_jax.transform._building import materialized_value
from lora_jax.transform._dropout import Dropout, NoDropout
from lora_jax.transform._factored import Factored
from lora_jax.transform._interpreter import Interpreter
from lora_jax.transform._report import OnMaterialize, Recorder, Reporter, recorder_for
from lora_jax.transform._sharing import SharedFunctions
from lora_jax.transform._static import (
    NotComparableError,
    computes_with_numbers,
    is_number,
    with_static,
    without_static,
)
from lora_jax.transform._symbolic import symbolic_weight
from lora_jax.transform.rules import with_factors


def adapt(
    fn: Callable[..., Any], *, on_materialize: OnMaterialize = "warn", dropout: float = 0.0
) -> Callable[..., Any]:
    r"""Returns `fn` as a function of wrapped or quantised parameters, without changes to its code.

    The result is that of `fn` with $W + s \cdot A B$ in place of each adapted weight $W$; a
    contraction $x W$ becomes $x W + s\,(x A) B$; the sum is built where that is cheaper and as
    exact, as `explain` shows, and its gradient is not kept. A quantised weight, adapted or not, is
    what it dequantises to; loops and the backward pass keep its codes. The result differentiates,
    jits, vmaps, scans, remats and shards as `fn` does. `base` and `scale` receive no gradient.

    Args:
      fn: any JAX function: `model.apply`, a bound method, a loss, or one that holds adapters
        itself, such as a wrapped Equinox module. With neither adapters nor quantised weights in its
        arguments, it is called unchanged. Otherwise it is traced once for each structure, shape and
        dtype of its arguments. A Python float that `fn` only combines with arrays is traced, as
        under `jax.jit`, so a new value does not retrace; where `fn` reads its value or computes
        with it in Python, it is static. Other arguments that are not arrays (flags, whole numbers,
        strings, functions, configurations) are static too; changing them or their own attributes
        retraces.
      on_materialize: what to do at an op that no rule covers, where W + AB must be built: `"warn"`
        (a `MaterializationWarning` that names path, op and source line), `"error"`, `"ignore"`.
      dropout: the probability of dropping an element of an adapter's input, rounded to a multiple
        of 1/65536, with an independent mask for each use. Dropout is active only when `lora_key=`,
        a random key, is passed; evaluation needs no second function. It does not apply inside
        functions with their own derivative rules.

    Returns:
      A function of the same arguments, with `LoRAWeight` and `QuantizedWeight` nodes anywhere in
      them, and of `lora_key`.

    Raises:
      ValueError: `on_materialize` or `dropout` is out of range; `fn` has an argument `lora_key` of
        its own, and `dropout` is not 0; or, when called, `lora_key` is given without `dropout`.
      MaterializationError: when called, under `on_materialize="error"`.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> apply = lambda params, x: x @ params["kernel"]
      >>> wrapped = lora_jax.wrap(params, "kernel", rank=2)
      >>> lora_jax.adapt(apply)(wrapped, jnp.ones((1, 4))).tolist()
      [[4.0, 4.0, 4.0]]
    """
    return _adapted_by_kind(fn, on_materialize, dropout, may_merge=True)


def adapt_each(fn: Callable[..., Any], *, on_materialize: OnMaterialize) -> Callable[..., Any]:
    """Returns `adapt(fn)` for one of many adapters under `jax.vmap`, which share their weights.

    Merged, each example would have a weight of its own.
    """
    return _adapted_by_kind(fn, on_materialize, 0.0, may_merge=False)


def _adapted_by_kind(
    fn: Callable[..., Any], on_materialize: OnMaterialize, dropout: float, *, may_merge: bool
) -> Callable[..., Any]:
    """Returns an adapted function, with regard to what it is bound to and to its arguments."""
    if on_materialize not in ("warn", "error", "ignore"):
        raise ValueError(
            f"`on_materialize` is {on_materialize!r}; expected 'warn', 'error' or 'ignore'."
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"`dropout` is {dropout!r}; expected a probability from 0 to below 1.")
    function, bound = unbound(fn)
    if bound != ((), {}):
        adapted = _adapted_by_kind(function, on_materialize, dropout, may_merge=may_merge)
        return _with_bound(fn, adapted)
    if _has_lora_key(fn, open_ended=dropout == 0):
        if dropout:
            raise ValueError(
                "`fn` has an argument `lora_key` of its own, which adapt(fn, dropout=...) would "
                "take for the key of its masks; give it another name."
            )
        return _adapted_without_key(fn, on_materialize, may_merge=may_merge)
    with_key = _adapted(fn, on_materialize, dropout, may_merge=may_merge)

    @functools.wraps(fn)
    def with_optional_key(*args: Any, lora_key: PRNGKeyArray | None = None, **kwargs: Any) -> Any:
        if lora_key is not None and dropout == 0:
            raise ValueError("`lora_key` is given, but dropout is 0; call adapt(fn, dropout=0.1).")
        return with_key(lora_key, (args, kwargs))

    return with_optional_key


def unbound(fn: Any) -> tuple[Callable[..., Any], tuple[Any, Any]]:
    """Returns the function that `fn` calls, and the (args, kwargs) with adapters that it holds.

    Arguments bound by `functools.partial`, a callable tree such as an Equinox module, and the tree
    that a method belongs to are treated as ordinary arguments.
    """
    if isinstance(fn, functools.partial):
        function, (args, kwargs) = unbound(fn.func)
        if args or kwargs or _holds_node((fn.args, fn.keywords)):
            return function, ((*args, *fn.args), {**kwargs, **fn.keywords})
    elif _holds_node(getattr(fn, "__self__", None)):
        return fn.__func__, ((fn.__self__,), {})
    elif _holds_node(fn):
        return type(fn).__call__, ((fn,), {})
    return fn, ((), {})


def _holds_node(tree: Any) -> bool:
    """Says whether a tree holds anything that the model must not meet: weights in full, too."""
    return any(map(is_node, jax.tree.leaves(tree, is_leaf=is_node)))


def _holds_weight(tree: Any) -> bool:
    return any(map(is_weight, jax.tree.leaves(tree, is_leaf=is_weight)))


def _with_bound(fn: Callable[..., Any], adapted: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def called(*args: Any, **kwargs: Any) -> Any:
        _, (bound_args, bound_kwargs) = unbound(fn)
        return adapted(*bound_args, *args, **{**bound_kwargs, **kwargs})

    return called


def _has_lora_key(fn: Callable[..., Any], *, open_ended: bool) -> bool:
    """Says whether `fn` has an argument `lora_key`, or with `open_ended` may take any by name."""
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):  # some callables written in C have no signature
        return False
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return "lora_key" in parameters or (open_ended and takes_any)


def _adapted_without_key(
    fn: Callable[..., Any], on_materialize: OnMaterialize, *, may_merge: bool
) -> Callable[..., Any]:
    with_key = _adapted(fn, on_materialize, 0.0, may_merge=may_merge)

    @functools.wraps(fn)
    def adapted(*args: Any, **kwargs: Any) -> Any:
        return with_key(None, (args, kwargs))

    return adapted


def _adapted(
    fn: Callable[..., Any], on_materialize: OnMaterialize, dropout: float, *, may_merge: bool
) -> Callable[[PRNGKeyArray | None, Any], Any]:
    """Returns `fn` as a function of a dropout key and of (args, kwargs) that may hold adapters."""
    told = recorder_for(on_materialize)

    def rewritten(lora_key: PRNGKeyArray | None, arguments: Any) -> Any:
        masks = NoDropout() if lora_key is None else Dropout(dropout, lora_key)
        return rewrite(fn, arguments, recorder=told, dropout=masks, may_merge=may_merge)

    # Maps each signature to whether `fn` needs the values of Python floats, so that this takes one
    # trace to find out.
    needs_values: dict[Hashable, bool] = {}

    def traced(*inputs: Any) -> tuple[ClosedJaxpr, Any]:
        closed_jaxpr, output = jax.make_jaxpr(rewritten, return_shape=True)(*inputs)
        return closed_jaxpr, jax.tree.structure(output)

    def with_floats_traced(lora_key: PRNGKeyArray | None, arguments: Any) -> Any:
        """Returns the outputs with floats traced, or with their values where `fn` needs those."""
        inputs = lora_key, with_static(arguments, comparable=True, trace_floats=True)
        leaves, structure = jax.tree.flatten(inputs)
        if not any(map(is_number, leaves)):
            return _evaluated(traced(*inputs), inputs)
        signature = structure, tuple(map(jax.typeof, leaves))
        program = None if needs_values.get(signature) else _if_traceable(traced, inputs)
        if signature not in needs_values:
            needs_values[signature] = program is None or computes_with_numbers(program[0].jaxpr)
        if program is None or needs_values[signature]:
            inputs = lora_key, with_static(arguments, comparable=True)
            program = traced(*inputs)
        return _evaluated(program, inputs)

    def adapted(lora_key: PRNGKeyArray | None, arguments: Any) -> Any:
        arguments = with_trained_values(arguments)
        if not _holds_weight(arguments):
            args, kwargs = arguments
            return fn(*args, **kwargs)
        try:
            return with_floats_traced(lora_key, arguments)
        except NotComparableError:
            # Arguments that can't be compared with those of another call are traced for this one.
            return without_static(rewritten(lora_key, with_static(arguments)))

    return adapted


def _if_traceable(
    traced: Callable[..., tuple[ClosedJaxpr, Any]], inputs: Any
) -> tuple[ClosedJaxpr, Any] | None:
    """Returns the traced function, or None if it fails on a tracer in place of a float."""
    with contextlib.suppress(Exception):  # whatever a model raises on what it does not expect
        return traced(*inputs)
    return None


def _evaluated(program: tuple[ClosedJaxpr, Any], inputs: Any) -> Any:
    """Returns the outputs of a traced function, in the structure of its outputs."""
    closed_jaxpr, structure = program
    values = evaluate(closed_jaxpr, jax.tree.leaves(inputs))
    return without_static(jax.tree.unflatten(structure, values))


def rewrite(
    fn: Callable[..., Any],
    arguments: Any,
    *,
    recorder: Recorder,
    dropout: Dropout | NoDropout,
    may_merge: bool = True,
) -> Any:
    """Returns the outputs of `fn` on (args, kwargs) that hold adapted or quantised weights.

    Args:
      fn: the function as its author wrote it.
      arguments: (args, kwargs), in which leaves that are not arrays are static.
      recorder: is called with each use of an adapted weight.
      dropout: LoRA dropout.
      may_merge: whether an op may multiply by W + AB, with the gradients of the factors.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(arguments, is_leaf=is_weight)
    leaves = [leaf for _, leaf in flat]
    paths = weight_paths(flat)
    plain = [stand_in(innermost_base(leaf)) for leaf in leaves]
    traced = traced_function(fn, structure, plain)
    reporter = Reporter(recorder)
    interpreter = Interpreter(
        with_factors(), SharedFunctions(), reporter, dropout, may_merge=may_merge
    )
    values = [
        symbolic_weight(leaf, path, reporter) if is_weight(leaf) else leaf
        for leaf, path in zip(leaves, paths, strict=True)
    ]
    outputs = [
        materialized_value(reporter, value, "the output", "the end of the function")
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
    """Returns the path of each leaf within its argument; with the argument if it is ambiguous."""
    key_paths = [key_path for key_path, _ in flat]
    within, whole = path_strings(key_paths, skip=2), path_strings(key_paths, skip=1)
    adapted = collections.Counter(
        path for path, (_, leaf) in zip(within, flat, strict=True) if has_factors(leaf)
    )
    return [
        longer if adapted[path] > 1 else path for path, longer in zip(within, whole, strict=True)
    ]


def with_trained_values(tree: Any) -> Any:
    """Returns the tree with the trained copy in place of each weight that trains in full."""
    return map_nodes(lambda node: node.value if isinstance(node, FullWeight) else node, tree)
