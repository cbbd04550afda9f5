"""`adapt`: what a function may take and return."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.agreement import assert_agree
from tests.arrays import random
from tests.transform.projection import MERGED, WRAPPED, X, project, with_options


@dataclasses.dataclass(frozen=True)
class Config:
    scale: float


class Model:
    def __init__(self, power: int) -> None:
        self.power = power

    def apply(self, params: Any, x: jax.Array) -> jax.Array:
        return project(params, x) ** self.power


CALLS: dict[str, tuple[Callable[..., Any], Callable[[Any], Any]]] = {
    "a flag": (with_options, lambda p: ((p, X), {"train": True})),
    "a string": (with_options, lambda p: ((p, X, "first"), {})),
    "None": (with_options, lambda p: ((p, X, None), {})),
    "a function": (with_options, lambda p: ((p, X), {"activation": jnp.sin})),
    "all by name": (with_options, lambda p: ((), {"params": p, "x": X, "train": True})),
    "numpy": (with_options, lambda p: ((p, np.asarray(X)), {})),
    "a frozen object": (
        lambda p, x, c: project(p, x) * c.scale,
        lambda p: ((p, X, Config(3.0)), {}),
    ),
    "a tree of options": (
        lambda p, x, o: project(p, x) * o["a"][0] if o["b"] else x,
        lambda p: ((p, X, {"a": (2.0, None), "b": True}), {}),
    ),
    "a list of trees": (
        lambda ps, x: project(ps[1], project(ps[0], x)),
        lambda p: (([p, p], X), {}),
    ),
    "two trees": (
        lambda a, x, b: project(b, project(a, x)),
        lambda p: ((p, X), {"b": p}),
    ),
    "a bare weight": (lambda w, x: x @ w, lambda p: ((p["W"], X), {})),
    "a bound method": (Model(2).apply, lambda p: ((p, X), {})),
    "a partial": (functools.partial(with_options, train=True), lambda p: ((p, X), {})),
    "a jitted function": (
        jax.jit(with_options, static_argnames=("train",)),
        lambda p: ((p, X), {"train": True}),
    ),
    "several outputs": (
        lambda p, x: (project(p, x), {"x": x, "norm": jnp.sum(x)}),
        lambda p: ((p, X), {}),
    ),
    "the weight itself": (lambda p, x: (p["W"], x), lambda p: ((p, X), {})),
}


@pytest.mark.parametrize(("fn", "arguments"), CALLS.values(), ids=CALLS)
@pytest.mark.filterwarnings("ignore::lora_jax.MaterializationWarning")
def test_calls(fn: Callable[..., Any], arguments: Callable[[Any], Any]) -> None:
    args, kwargs = arguments(WRAPPED)
    expected_args, expected_kwargs = arguments(MERGED)
    assert_agree(lora_jax.adapt(fn)(*args, **kwargs), fn(*expected_args, **expected_kwargs))


def test_outputs_that_are_no_arrays() -> None:
    extras = {
        "name": "a",
        "count": 3,
        "rate": 0.5,
        "none": None,
        "function": len,
        "config": Config(1),
    }
    y, found = lora_jax.adapt(lambda p, x: (project(p, x), extras))(WRAPPED, X)
    assert found == extras
    assert y.shape == X.shape


def test_aux_outputs_of_a_gradient() -> None:
    def loss(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        y = project(params, x)
        return jnp.sum(y), {"y": y, "count": y.size}

    adapted = lora_jax.adapt(loss)
    (value, aux), gradient = jax.value_and_grad(adapted, has_aux=True)(WRAPPED, X)
    (expected, expected_aux) = loss(MERGED, X)
    assert_agree((value, aux["y"]), (expected, expected_aux["y"]))
    assert jax.tree.structure(gradient) == jax.tree.structure(WRAPPED)


def test_the_name_and_signature_are_kept() -> None:
    adapted = lora_jax.adapt(project)
    assert (adapted.__name__, adapted.__wrapped__) == ("project", project)


def test_without_adapters_the_function_is_called_as_it_is() -> None:
    marker = object()
    assert lora_jax.adapt(lambda *args, **kwargs: (marker, args, kwargs))(1, a="b") == (
        marker,
        (1,),
        {"a": "b"},
    )


def test_weights_trained_in_full() -> None:
    params = {"W": random(24, 24), "b": random(24, seed=1)}

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["W"] + params["b"][None]

    wrapped = lora_jax.wrap(params, "W", rank=2, train="b")
    gradient = jax.grad(lambda w: lora_jax.adapt(fn)(w, X).sum())(wrapped)
    assert_agree(gradient["b"].value, np.full(24, 5.0))
    assert not np.any(np.asarray(gradient["b"].base))
    only_full = lora_jax.wrap(params, "W", rank=2, train="b")["b"]
    actual = lora_jax.adapt(fn)({"W": params["W"], "b": only_full}, X)
    assert_agree(actual, fn(params, X))


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    "options", [{"on_materialize": "raise"}, {"on_materialize": None}, {"dropout": 2.0}]
)
def test_options_are_checked_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` is"):
        lora_jax.adapt(project, **options)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Affine:
    """A callable tree, as a module of Equinox is."""

    W: Any
    b: Any

    def __call__(self, x: Any) -> Any:
        return x @ self.W + self.b[None]

    def apply(self, x: Any) -> Any:
        return self(x)


BOUND: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "a callable tree": lambda tree: tree,
    "its method": lambda tree: tree.apply,
    "a partial": lambda tree: functools.partial(lambda tree, x: tree(x), tree),
    "a partial by name": lambda tree: functools.partial(lambda x, tree: tree(x), tree=tree),
}


@pytest.mark.parametrize("bound", BOUND.values(), ids=BOUND)
def test_a_function_that_holds_nothing_but_weights_in_full(bound: Any) -> None:
    params = Affine(jnp.ones((3, 2)), jnp.zeros(2))
    x = jnp.ones((4, 3))
    wrapped = dataclasses.replace(params, b=lora_jax.FullWeight(params.b, params.b + 1))
    expected = dataclasses.replace(params, b=params.b + 1)(x)
    assert_agree(lora_jax.adapt(bound(wrapped))(x), expected)
    assert lora_jax.explain(bound(wrapped), x).targets == ()
