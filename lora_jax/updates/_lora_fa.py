"""LoRA-FA: lora_A stays fixed, and lora_B's gradient represents the weight's."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

from lora_jax._row_selection import selects_rows
from lora_jax._train import TRAINABLE
from lora_jax.updates._checks import check_fits, check_positive, check_transformation
from lora_jax.updates._nodes import KnownWeight, Node, map_factors, map_with_weights
from lora_jax.updates._parts import Transformation, is_absent, on_part
from lora_jax.updates._preconditioning import preconditioned


def lora_fa(
    tx: Transformation, *, damping: float | Array = 1e-8
) -> optax.GradientTransformationExtraArgs:
    r"""Returns `tx` with lora_A frozen and the gradient of lora_B preconditioned.

    $$u_A = 0, \qquad g_B \leftarrow \frac{1}{s^2} (A^\top A + \delta I)^{-1} g_B$$

    With lora_A fixed, a step along this $g_B$ changes the weight by the projection of its dense
    gradient onto the columns of lora_A. `tx` sees neither the gradient nor the value of lora_A:
    it keeps no state for it, and whatever it does, weight decay included, lora_A keeps its bits. So
    put clipping and everything else inside: `lora_fa(optax.chain(...))`. Weights trained in full
    train with `tx` unchanged, and so do single rows, whose gradient is that of the weight already.

    The gradient of lora_A is still computed, unless `wrap(..., freeze="lora_A")` says that it isn't
    needed; this also saves the activation memory that the paper aims at.

    Args:
      tx: the transformation for what trains, such as `optax.adamw(1e-3)`.
      damping: $\delta$, positive; PEFT's value by default. Where rounding in $A^\top A$ is larger,
        its size is used instead.

    Returns:
      A transformation whose `update` also needs the parameters: a wrapped tree, within
      `lora_jax.optimizer`. With the trainable half from `split`, which doesn't hold the scale, call
      `update(gradients, state, adapters, wrapped=lora_jax.combine(adapters, frozen))`.

    Raises:
      TypeError: `tx` is not a transformation, or `damping` is not a number.
      ValueError: `damping` is not positive and finite; from `init`, nothing trains but lora_A; or,
        from `update`, the parameters or the scale are missing.

    Source: Zhang et al., LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models
    Fine-tuning, 2023.

    Examples:
      >>> import jax, jax.numpy as jnp, lora_jax, optax
      >>> wrapped = lora_jax.wrap({"kernel": jnp.ones((4, 3))}, "kernel", rank=2)
      >>> tx = lora_jax.optimizer(lora_jax.updates.lora_fa(optax.sgd(1.0)))
      >>> gradient = jax.tree.map(jnp.ones_like, wrapped)
      >>> updates, state = tx.update(gradient, tx.init(wrapped), wrapped)
      >>> bool((updates["kernel"].lora_A == 0).all())
      True
    """
    check_transformation("tx", tx)
    check_positive("damping", damping)
    inner = on_part(tx, lambda label: label != "lora_A")

    def projected(update: Node, weight: KnownWeight) -> Node:
        if is_absent(update.lora_B) or selects_rows(update):
            return update
        lora_B = preconditioned(
            update.lora_B,
            weight.leaf("lora_A"),
            update.axes,
            "in",
            damping=damping,
            scale=weight.leaf("scale"),
        )
        return dataclasses.replace(update, lora_B=lora_B)

    def init(params: Any) -> optax.OptState:
        check_fits("lora_fa", params, set(TRAINABLE) - {"lora_A"})
        return inner.init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        extra_args = {"wrapped": params, **extra_args}
        scaled = map_with_weights(
            projected, updates, params=params, wrapped=extra_args["wrapped"], name="lora_fa"
        )
        updates, state = inner.update(scaled, state, params, **extra_args)
        return map_factors(_with_zero_A, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _with_zero_A(path: str, update: Node) -> Node:
    del path
    if is_absent(update.lora_A) or selects_rows(update):
        return update
    return dataclasses.replace(update, lora_A=-jnp.zeros_like(update.lora_A))
