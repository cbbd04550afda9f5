"""Labels, and the two halves of a wrapped tree."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import lora_jax
from tests.arrays import random

KEY = jax.random.key(2)
FROZEN = "frozen"


PARAMS = {
    "first": {"kernel": random(8, 8), "bias": random(8, seed=1)},
    "second": {"kernel": random(8, 3, seed=2), "bias": random(3, seed=3)},
}


def wrapped_params(**options: Any) -> Any:
    return lora_jax.wrap(PARAMS, "kernel", rank=2, train="second/bias", key=KEY, **options)


def test_labels_of_every_kind_of_node() -> None:
    found = lora_jax.labels({**wrapped_params(), "none": None, "step": jnp.ones((), jnp.int32)})
    assert found["first"]["kernel"] == lora_jax.LoRAWeight(
        base=FROZEN, lora_A="lora_A", lora_B="lora_B", scale=FROZEN, axes=("in", "out")
    )
    assert found["second"]["bias"] == lora_jax.FullWeight(base=FROZEN, value="full")
    assert (found["first"]["bias"], found["none"], found["step"]) == (FROZEN, None, FROZEN)


def test_labels_have_the_structure_of_the_tree() -> None:
    wrapped = wrapped_params()
    assert jax.tree.structure(lora_jax.labels(wrapped)) == jax.tree.structure(wrapped)


def test_plain_params_are_frozen() -> None:
    assert set(jax.tree.leaves(lora_jax.labels(PARAMS))) == {FROZEN}


# --- the two halves ----------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: Any
    bias: Any


def first_entries(wrapped: Any) -> jax.Array:
    """Returns a number; its gradient is float0 where there is nothing to differentiate."""
    return sum(
        leaf.ravel()[0]
        for leaf in jax.tree.leaves(wrapped)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    )


TREES: dict[str, Callable[[], Any]] = {
    "dict": wrapped_params,
    "None leaves": lambda: {**wrapped_params(), "none": None, "deep": {"none": [None, None]}},
    "integers": lambda: {**wrapped_params(), "step": jnp.ones((), jnp.int32), "size": 3},
    "keys": lambda: {**wrapped_params(), "key": KEY},
    "gradients": lambda: jax.grad(first_entries, allow_int=True)(
        {**wrapped_params(), "key": KEY, "step": jnp.ones((), jnp.int32)}
    ),
    "shapes": lambda: jax.eval_shape(wrapped_params),
    "masked": lambda: {**wrapped_params(), "other": optax.MaskedNode()},
    "list and tuple": lambda: [wrapped_params(), (PARAMS, wrapped_params())],
    "dataclass": lambda: lora_jax.wrap(Layer(random(4, 4), None), "kernel", rank=2),
    "one node": lambda: lora_jax.wrap(random(4, 4), lambda path, leaf: True, rank=2),
    "nothing trains": lambda: PARAMS,
    "empty": dict,
}


@pytest.fixture(params=TREES.values(), ids=TREES)
def tree(request: pytest.FixtureRequest) -> Any:
    return request.param()


def test_combining_the_halves_gives_the_tree(tree: Any) -> None:
    combined = lora_jax.combine(*lora_jax.split(tree))
    assert jax.tree.structure(combined) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(combined), jax.tree.leaves(tree), strict=True):
        assert a is b


def test_the_halves_share_no_leaf(tree: Any) -> None:
    adapters, frozen = lora_jax.split(tree)
    labels = jax.tree.leaves(lora_jax.labels(tree))
    trainable = [
        x for x, label in zip(jax.tree.leaves(tree), labels, strict=True) if label != FROZEN
    ]
    assert [id(x) for x in jax.tree.leaves(adapters)] == [id(x) for x in trainable]
    assert len(jax.tree.leaves(frozen)) == len(labels) - len(trainable)


def other_axes() -> Any:
    axes = {"kernel": ("out", "in")}
    return lora_jax.wrap(PARAMS, "kernel", rank=2, axes=axes, train="second/bias")


@pytest.mark.parametrize(
    "halves",
    [
        lambda a, f: (a, lora_jax.split({"other": PARAMS})[1]),
        lambda a, f: (a, lora_jax.split(PARAMS)[1]),
        lambda a, f: (a, lora_jax.split(other_axes())[1]),
        lambda a, f: (a, a),
        lambda a, f: (f, f),
    ],
    ids=["another tree", "plain", "other axes", "adapters twice", "frozen twice"],
)
def test_what_are_no_halves_of_one_tree_raises(halves: Callable[[Any, Any], Any]) -> None:
    with pytest.raises(ValueError, match=r"(?s)`adapters`.*`frozen`"):
        lora_jax.combine(*halves(*lora_jax.split(wrapped_params())))
