"""A transformation that works on a part of a tree, whatever extra arguments it takes.

Optax passes extra arguments on unchanged: the gradient again, and functions of the parameters
(`value_fn` of a line search, `grad_fn` of SAM, `obj_fn` of Sophia), which expect the whole tree. A
transformation of a part of the tree must see the same part in them.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax

from lora_jax._train import combine, labels, parts

Tree = Any
# What optax calls a transformation; `MultiSteps` has the methods without being one.
Transformation = optax.GradientTransformation | optax.MultiSteps


def is_absent(leaf: Any) -> bool:
    """Says whether a leaf was masked out, or is in another part of a divided tree."""
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def on_part(
    tx: Transformation, belongs: Callable[[str], bool]
) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` for the leaves whose label `belongs`; the updates of the others pass unchanged.

    The state is that of `tx` on the part, a tree with None for everything else. Extra arguments
    that have the structure of the whole tree are cut to the part, and functions of the whole tree
    become functions of the part. `wrapped`, the whole tree, stays whole: it is where the
    transformations of `lora_jax.updates` find what a part leaves out.
    """
    inner = open_to_extra_args(tx)

    def init(params: Tree) -> optax.OptState:
        return inner.init(parts(params, belongs)[0])

    def update(
        updates: Tree, state: optax.OptState, params: Tree = None, **extra_args: Any
    ) -> tuple[Tree, optax.OptState]:
        view = _View(updates if params is None else params, updates, belongs)
        wrapped = extra_args.pop("wrapped", params)
        known: Any = {name: view.of(value) for name, value in extra_args.items()}
        params_part = None if params is None else parts(params, belongs)[0]
        part, state = inner.update(
            parts(updates, belongs)[0], state, params_part, wrapped=wrapped, **known
        )

        def merged(label: str, moved: Tree, update: Tree) -> Tree:
            return moved if belongs(label) else update

        return jax.tree.map(merged, labels(updates), part, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def open_to_extra_args(
    tx: Transformation,
) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` as a transformation that receives the extra arguments that its update takes.

    `optax.MultiSteps` passes them on, but is not a `GradientTransformationExtraArgs`, so optax's
    own wrappers would drop them.
    """
    own_update: Any = tx.update
    parameters = inspect.signature(own_update).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return optax.GradientTransformationExtraArgs(tx.init, own_update)
    # The first three are the updates, the state and the parameters.
    taken = frozenset(list(parameters)[3:])

    def update(
        updates: Tree, state: optax.OptState, params: Tree = None, **extra_args: Any
    ) -> tuple[Tree, optax.OptState]:
        known: Any = {name: value for name, value in extra_args.items() if name in taken}
        return own_update(updates, state, params, **known)

    return optax.GradientTransformationExtraArgs(tx.init, update)


@dataclasses.dataclass(frozen=True)
class _View:
    """How a transformation of a part sees extra arguments about the whole tree."""

    whole: Tree
    updates: Tree
    belongs: Callable[[str], bool]

    def of(self, value: Any) -> Any:
        """Returns an extra argument with whole trees cut to the part."""
        # The gradient of an Equinox model is a tree that can be called.
        if callable(value) and not self._is_whole(value):
            return self._of_function(value)
        return jax.tree.map(self._cut, value, is_leaf=self._is_whole)

    def _is_whole(self, tree: Any) -> bool:
        # A gradient may have None where there is nothing to differentiate.
        wholes: Any = jax.tree.structure(self.whole), jax.tree.structure(self.updates)
        return jax.tree.structure(tree) in wholes

    def _cut(self, tree: Any) -> Any:
        return parts(tree, self.belongs)[0] if self._is_whole(tree) else tree

    def _of_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function of the whole tree as a function of the part, with the rest fixed."""
        part, rest = parts(self.whole, self.belongs)
        structure: Any = jax.tree.structure(part)

        def filled(argument: Any) -> Any:
            is_part = jax.tree.structure(argument) == structure
            return combine(argument, rest) if is_part else argument

        @functools.wraps(function)
        def of_part(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("wrapped", None)
            filled_kwargs = {name: filled(value) for name, value in kwargs.items()}
            return self.of(function(*map(filled, args), **filled_kwargs))

        of_part.__signature__ = _open_to_wrapped(function)  # type: ignore[attr-defined]
        return of_part


def _open_to_wrapped(function: Callable[..., Any]) -> inspect.Signature:
    """Returns the signature of `function` with `wrapped` among its arguments.

    A line search reads from it which extra arguments its function takes, and refuses others.
    """
    signature = inspect.signature(function)
    if "wrapped" in signature.parameters:
        return signature
    added = inspect.Parameter("wrapped", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = sorted([*signature.parameters.values(), added], key=lambda each: each.kind)
    return signature.replace(parameters=parameters)
