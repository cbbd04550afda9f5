"""The forms in which a transformation meets a tree, and how steps are taken with each."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import lora_jax
from tests.agreement import assert_agree
from tests.updates.reference import (
    VARIANTS,
    Variant,
    expected_matrices,
    gradients_like,
    matrices,
)

# Where axes make no difference, fewer weights compile sooner.
FEW = ("dense", "layers of heads")

each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


class Whole:
    """The wrapped tree by itself."""

    def __init__(self, tx: Any) -> None:
        self.tx = tx

    def init(self, wrapped: Any) -> Any:
        return self.tx.init(wrapped)

    def step(self, wrapped: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, state = self.tx.update(gradients, state, wrapped)
        return optax.apply_updates(wrapped, updates), state


class Masked(Whole):
    """The wrapped tree in `lora_jax.optimizer`, which masks what doesn't train."""

    def __init__(self, tx: Any) -> None:
        super().__init__(lora_jax.optimizer(tx))


class Half(Whole):
    """The trainable half of the tree."""

    def init(self, wrapped: Any) -> Any:
        return self.tx.init(lora_jax.split(wrapped)[0])

    def step(self, wrapped: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        adapters, frozen = lora_jax.split(wrapped)
        gradients, _ = lora_jax.split(gradients)
        updates, state = self.tx.update(gradients, state, adapters, wrapped=wrapped)
        return lora_jax.combine(optax.apply_updates(adapters, updates), frozen), state


FORMS = {"whole": Whole, "masked": Masked, "half": Half}
each_trainable_form = pytest.mark.parametrize("form", [Masked, Half], ids=["masked", "half"])


def eager(form: Whole, wrapped: Any, gradients: list[Any]) -> Any:
    state = form.init(wrapped)
    for each in gradients:
        wrapped, state = form.step(wrapped, state, each)
    return wrapped


def jitted(form: Whole, wrapped: Any, gradients: list[Any]) -> Any:
    state, step = form.init(wrapped), jax.jit(form.step)
    for each in gradients:
        wrapped, state = step(wrapped, state, each)
    return wrapped


def stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def check(variant: Variant, tx: Any, before: Any, gradients: list[Any], after: Any) -> None:
    """Compares every weight with the computation in NumPy.

    Optax's schedules and accumulators are in float32.
    """
    for name in before.keys() - {"head"}:
        nodes = [each[name]["kernel"] for each in gradients]
        expected = expected_matrices(variant, tx(), before[name]["kernel"], nodes)
        for found, wanted in zip(matrices(after[name]["kernel"]), expected, strict=True):
            assert_agree(found, wanted)


def gradients_of(wrapped: Any, steps: int) -> list[Any]:
    return [gradients_like(wrapped, seed=10 + step) for step in range(steps)]
