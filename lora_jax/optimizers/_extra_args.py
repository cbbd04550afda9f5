"""Extra arguments of transformations."""

import inspect
from typing import Any

import optax


def open_to_extra_args(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` such that extra arguments reach it if its update takes any.

    `optax.MultiSteps` hands them on, but is no `GradientTransformationExtraArgs`, and so optax's
    own wrappers would keep them back.
    """
    parameters = inspect.signature(tx.update).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return optax.GradientTransformationExtraArgs(tx.init, tx.update)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del extra_args
        return tx.update(updates, state, params)

    return optax.GradientTransformationExtraArgs(tx.init, update)
