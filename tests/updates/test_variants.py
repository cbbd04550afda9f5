"""Every method × every form of the tree, axes and transform, and their numbers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from tests.agreement import assert_agree
from tests.updates.forms import (
    FEW,
    FORMS,
    Masked,
    Whole,
    check,
    each_trainable_form,
    each_variant,
    eager,
    gradients_of,
    jitted,
    stack,
)
from tests.updates.reference import (
    DECAY,
    RATE,
    VARIANTS,
    Adamw,
    Sgd,
    Variant,
    expected_matrices,
    gradients_like,
    matrices,
    wrapped_params,
)

INNER: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "sgd": (lambda: optax.sgd(RATE), Sgd),
    "adamw": (lambda: optax.adamw(RATE, weight_decay=DECAY), Adamw),
}


def scanned(form: Whole, wrapped: Any, gradients: list[Any]) -> Any:
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *gradients)
    carry = (wrapped, form.init(wrapped))
    return jax.lax.scan(lambda c, g: (form.step(*c, g), None), carry, stacked)[0][0]


def vmapped(form: Whole, wrapped: Any, gradients: list[Any]) -> Any:
    """Trains it beside another tree, and returns the first of the two."""
    other = gradients_like(wrapped, seed=99)
    pair = stack([wrapped, other])
    state = jax.vmap(form.init)(pair)
    step = jax.jit(jax.vmap(form.step))
    for each in gradients:
        pair, state = step(pair, state, stack([each, other]))
    return jax.tree.map(lambda x: x[0], pair)


TRANSFORMS = {"jit": jitted, "scan": scanned, "vmap": vmapped}


@pytest.mark.usefixtures("float64")
@each_variant
def test_weights_of_any_axes(variant: Variant) -> None:
    wrapped = wrapped_params()
    gradients = gradients_of(wrapped, steps=3)
    inner = optax.adamw(RATE, weight_decay=DECAY)
    after = jitted(Masked(variant.around(inner)), wrapped, gradients)
    check(variant, Adamw, wrapped, gradients, after)


# By itself, weight decay would shrink base and scale as well.
SAFE = [(form, inner) for form in FORMS for inner in INNER if (form, inner) != ("whole", "adamw")]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("form", "inner"), SAFE)
@each_variant
def test_every_form_of_the_tree(variant: Variant, form: str, inner: str) -> None:
    wrapped = wrapped_params(FEW)
    gradients = gradients_of(wrapped, steps=3)
    make, expected = INNER[inner]
    after = eager(FORMS[form](variant.around(make())), wrapped, gradients)
    check(variant, expected, wrapped, gradients, after)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@each_trainable_form
@each_variant
def test_transforms(variant: Variant, form: Any, transform: Callable[..., Any]) -> None:
    wrapped = wrapped_params(("layers of heads",))
    gradients = gradients_of(wrapped, steps=2)
    inner = optax.adamw(RATE, weight_decay=DECAY)
    after = transform(form(variant.around(inner)), wrapped, gradients)
    check(variant, Adamw, wrapped, gradients, after)


# --- what isn't lora_A or lora_B ---------------------------------------------------------------


@each_trainable_form
@each_variant
def test_weights_trained_in_full_are_left_to_the_inner_transformation(
    variant: Variant, form: Any
) -> None:
    wrapped = wrapped_params(FEW, dtype=jnp.float32)
    gradients = gradients_of(wrapped, steps=2)
    after = eager(form(variant.around(optax.sgd(RATE, momentum=0.9))), wrapped, gradients)
    plain = eager(form(optax.sgd(RATE, momentum=0.9)), wrapped, gradients)
    np.testing.assert_array_equal(after["head"]["bias"].value, plain["head"]["bias"].value)


@each_trainable_form
@each_variant
def test_frozen_leaves_keep_their_bits(variant: Variant, form: Any) -> None:
    wrapped = wrapped_params(FEW, dtype=jnp.float32)
    after = eager(
        form(variant.around(optax.adamw(RATE, weight_decay=0.5))), wrapped, gradients_of(wrapped, 2)
    )
    assert jax.tree.structure(after) == jax.tree.structure(wrapped)
    for before_leaf, after_leaf in zip(
        *(jax.tree.leaves(lora_jax.split(tree)[1]) for tree in (wrapped, after)), strict=True
    ):
        np.testing.assert_array_equal(before_leaf, after_leaf)


@pytest.mark.usefixtures("float64")
@each_variant
def test_one_transformation_for_each_label(variant: Variant) -> None:
    """A group of `multi_transform` has the other factor masked, and finds it in `wrapped`."""
    wrapped = wrapped_params(FEW)
    gradients = gradients_of(wrapped, steps=2)
    groups = {label: variant.around(optax.sgd(RATE)) for label in variant.moves}
    if variant.rates[0]:
        groups = {"lora_A": optax.sgd(RATE), **groups}
    check(variant, Sgd, wrapped, gradients, eager(Masked(groups), wrapped, gradients))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("variant", "leaf"),
    [(variant, leaf) for variant in VARIANTS.values() for leaf in variant.moves],
    ids=[f"{name}-{leaf}" for name, variant in VARIANTS.items() for leaf in variant.moves],
)
def test_a_factor_that_does_not_train_serves_the_other(variant: Variant, leaf: str) -> None:
    wrapped = wrapped_params(FEW)
    gradients = gradients_of(wrapped, steps=1)
    both = eager(Masked(variant.around(optax.sgd(RATE))), wrapped, gradients)
    one = eager(Masked({leaf: variant.around(optax.sgd(RATE))}), wrapped, gradients)
    other = {"lora_A": "lora_B", "lora_B": "lora_A"}[leaf]
    for name in FEW:
        before_node, both_node, node = (tree[name]["kernel"] for tree in (wrapped, both, one))
        assert_agree(getattr(node, leaf), getattr(both_node, leaf), tolerance=1e-12)
        np.testing.assert_array_equal(getattr(node, other), getattr(before_node, other))


# --- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@each_variant
def test_narrow_factors_keep_their_dtype_under_strict_promotion(
    variant: Variant, dtype: Any
) -> None:
    wrapped = wrapped_params(FEW, dtype=dtype)
    gradients = gradients_of(wrapped, steps=1)
    with jax.numpy_dtype_promotion("strict"):
        after = jitted(Masked(variant.around(optax.sgd(RATE))), wrapped, gradients)
    tolerance = 20 * float(jnp.finfo(dtype).eps)
    for name in FEW:
        node = after[name]["kernel"]
        assert (node.lora_A.dtype, node.lora_B.dtype) == (dtype, dtype)
        expected = expected_matrices(
            variant, Sgd(), wrapped[name]["kernel"], [gradients[0][name]["kernel"]]
        )
        for found, wanted in zip(matrices(node), expected, strict=True):
            assert_agree(found, wanted, tolerance=tolerance)


@each_variant
def test_factors_stacked_in_front_need_no_vmap(variant: Variant) -> None:
    pair = [
        wrapped_params(FEW, dtype=jnp.float32),
        gradients_like(wrapped_params(FEW, dtype=jnp.float32), 5),
    ]
    pair[1] = jax.tree.map(lambda x, y: x + y, *pair)
    gradients = [gradients_like(pair[0], seed=seed) for seed in (6, 7)]
    form = Masked(variant.around(optax.sgd(RATE)))
    together = eager(form, stack(pair), [stack(gradients)])
    for place in range(2):
        alone = eager(form, pair[place], [gradients[place]])
        here = jax.tree.map(lambda x, place=place: x[place], together)
        assert_agree(here, alone)
