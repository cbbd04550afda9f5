"""What the methods refuse."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax.updates import lora_fa, lora_plus, riemannian
from tests.updates.forms import FEW, each_variant
from tests.updates.reference import VARIANTS, Variant, wrapped_params


@each_variant
def test_a_tree_without_adapters_raises(variant: Variant) -> None:
    params = {"kernel": jnp.ones((4, 3))}
    tx = variant.around(optax.sgd(1.0))
    with pytest.raises(ValueError, match=r"`params` has no adapters; .*`wrap` returned"):
        tx.init(params)
    with pytest.raises(ValueError, match=r"`updates` has no adapters; .*`wrap` returned"):
        tx.update(params, tx.init(wrapped_params(FEW, dtype=jnp.float32)), params)


def only_lora_A_trains() -> Any:
    return lora_jax.wrap({"kernel": jnp.ones((4, 3))}, "kernel", rank=2, init="mica")


AROUND: dict[str, Callable[[Any], Any]] = {
    "whole": lambda tx: tx,
    "optimizer": lora_jax.optimizer,
    "label": lambda tx: lora_jax.optimizer({"magnitude": tx}),
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
@each_variant
def test_a_tree_in_which_nothing_fits_raises(
    variant: Variant, around: Callable[[Any], Any]
) -> None:
    """Something trains, but nothing that the method moves."""
    wrapped = lora_jax.wrap(
        {"kernel": jnp.ones((4, 3))}, "kernel", rank=2, dora=True, freeze=("lora_A", "lora_B")
    )
    tx = around(variant.around(optax.sgd(1.0)))
    if variant is VARIANTS["lora_fa"]:  # it trains all but lora_A
        tx.init(wrapped)
        wrapped = only_lora_A_trains()
    with pytest.raises(ValueError, match=r"nothing trains"):
        tx.init(wrapped)


def test_the_error_names_what_is_missing() -> None:
    wrapped = only_lora_A_trains()
    message = (
        "`lora_fa` was given a tree in which nothing trains that it moves; expected at least one "
        "of 'full', 'lora_B', 'magnitude', and `params` has 'lora_A'"
    )
    with pytest.raises(ValueError, match=message):
        lora_jax.optimizer(lora_fa(optax.sgd(1.0))).init(wrapped)


NEEDS_FACTORS = {name: VARIANTS[name] for name in ("lora_fa", "riemannian")}
each_that_needs_factors = pytest.mark.parametrize(
    "variant", NEEDS_FACTORS.values(), ids=NEEDS_FACTORS
)


@pytest.mark.parametrize("around", [lambda tx: tx, lora_jax.optimizer], ids=["alone", "optimizer"])
@each_that_needs_factors
def test_no_parameters_raise(variant: Variant, around: Callable[[Any], Any]) -> None:
    wrapped = wrapped_params(FEW, dtype=jnp.float32)
    tx = around(variant.around(optax.sgd(1.0)))
    with pytest.raises(ValueError, match=r"`params` is None, .*update\(gradients, state, params\)"):
        tx.update(wrapped, tx.init(wrapped))


@pytest.mark.parametrize("argument", ["params", "wrapped"])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: {"kernel": jnp.ones((4, 3))}, "has a different structure from the updates"),
        (
            lambda: lora_jax.unwrap(wrapped_params(FEW, dtype=jnp.float32)),
            "has a .* at 'dense/kernel', where the updates have factors",
        ),
    ],
    ids=["structure", "plain"],
)
@each_that_needs_factors
def test_another_tree_raises(
    variant: Variant, argument: str, other: Callable[[], Any], message: str
) -> None:
    wrapped = wrapped_params(FEW, dtype=jnp.float32)
    tx = variant.around(optax.sgd(1.0))
    trees = {"params": wrapped, "wrapped": wrapped, argument: other()}
    with pytest.raises(ValueError, match=f"`{argument}` {message}"):
        tx.update(wrapped, tx.init(wrapped), trees["params"], wrapped=trees["wrapped"])


OPTIONS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "lora_plus": ("ratio", lora_plus),
    "lora_fa": ("damping", lambda value: lora_fa(optax.sgd(1.0), damping=value)),
    "riemannian": ("damping", lambda value: riemannian(damping=value)),
}
each_option = pytest.mark.parametrize(("name", "make"), OPTIONS.values(), ids=OPTIONS)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
@each_option
def test_a_number_that_is_not_positive_raises(
    name: str, make: Callable[[Any], Any], value: Any
) -> None:
    with pytest.raises(ValueError, match=f"`{name}` is {value}; expected a positive, finite"):
        make(value)


@pytest.mark.wrong_types
@pytest.mark.parametrize("value", [None, "16", True, [1.0], np.ones(2)])
@each_option
def test_what_is_no_number_raises(name: str, make: Callable[[Any], Any], value: Any) -> None:
    with pytest.raises(TypeError, match=f"`{name}` is .*; expected a number"):
        make(value)
