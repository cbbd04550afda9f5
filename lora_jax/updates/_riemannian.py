"""Riemannian preconditioning: gradients scaled by the other factor's r × r Gram matrix."""

import dataclasses
from typing import Any

import optax
from jaxtyping import Array

from lora_jax._row_selection import selects_rows
from lora_jax.updates._checks import check_fits, check_positive
from lora_jax.updates._nodes import KnownWeight, Node, map_with_weights
from lora_jax.updates._parts import is_absent
from lora_jax.updates._preconditioning import preconditioned


def riemannian(*, damping: float | Array = 1e-2) -> optax.GradientTransformationExtraArgs:
    r"""Returns a transformation that preconditions the gradient of each factor with the other.

    $$g_A \leftarrow g_A\, (B B^\top + \delta I)^{-1}, \qquad
    g_B \leftarrow (A^\top A + \delta I)^{-1} g_B$$

    This is the gradient under a metric of the low-rank matrices themselves: except for the damping,
    the change of their product is, to first order, independent of how the product is split between
    the factors. Placed first in a chain it gives the paper's scaled SGD (before `optax.sgd`) and
    scaled AdamW (before `optax.adamw`); clip the gradient before it. Every matrix of a stacked
    weight has its own Gram matrices. Weights trained in full and single rows pass unchanged, and a
    frozen factor only preconditions the other one. It has no state.

    Args:
      damping: $\delta$, positive. As $\lVert g_A \rVert \le s \lVert B \rVert \lVert
        \nabla W \rVert$, the preconditioned gradient of lora_A is at most $s\, \lVert \nabla W
        \rVert / (2 \sqrt\delta)$ while lora_B grows from zero: 5 times the gradient of a dense
        weight with the default, which is PEFT's, and 500 times with the 1e-6 of the paper's code.

    Returns:
      A transformation whose `update` also needs the parameters: a wrapped tree, within
      `lora_jax.optimizer`, or the trainable half from `split`. If the half lacks a factor
      (`wrap(..., freeze=...)`), pass `wrapped=lora_jax.combine(adapters, frozen)` as well.

    Raises:
      TypeError: `damping` is not a number.
      ValueError: `damping` is not positive and finite; from `init`, no factor trains; or, from
        `update`, the parameters or a factor are missing.

    Source: Zhang & Pilanci, Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models, 2024.

    Examples:
      >>> import jax.numpy as jnp, lora_jax, optax
      >>> wrapped = lora_jax.wrap({"kernel": jnp.ones((4, 3))}, "kernel", rank=2)
      >>> tx = optax.chain(lora_jax.updates.riemannian(), optax.adamw(1e-3))
      >>> state = lora_jax.optimizer(tx).init(wrapped)
    """
    check_positive("damping", damping)

    def natural(update: Node, weight: KnownWeight) -> Node:
        if selects_rows(update):
            return update
        lora_A, lora_B, axes = update.lora_A, update.lora_B, update.axes
        if not is_absent(lora_A):
            lora_A = preconditioned(lora_A, weight.leaf("lora_B"), axes, "out", damping=damping)
        if not is_absent(lora_B):
            lora_B = preconditioned(lora_B, weight.leaf("lora_A"), axes, "in", damping=damping)
        return dataclasses.replace(update, lora_A=lora_A, lora_B=lora_B)

    def init(params: Any) -> optax.OptState:
        check_fits("riemannian", params, {"lora_A", "lora_B"})
        return optax.init_empty_state(params)

    def update(
        updates: Any,
        state: optax.OptState,
        params: Any = None,
        *,
        wrapped: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, optax.OptState]:
        del extra_args
        updates = map_with_weights(
            natural, updates, params=params, wrapped=wrapped, name="riemannian"
        )
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)
