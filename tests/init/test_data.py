"""Initialisers that are made of data: of the inputs of a weight, or of its gradient."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax._shapes import to_matrices
from tests.agreement import assert_agree
from tests.arrays import random
from tests.init.initializers import SHAPES, a_gradient, as_matrices, gathered_moments, seen_inputs

DEGENERATE_INPUTS = {
    "none": np.zeros((0, 6)),
    "zero": np.zeros((4, 6)),
    "all equal": np.ones((4, 6)),
    "two tiny ones": 1e-12 * np.eye(6)[:2],
}
MOMENTS = {"kernel": gathered_moments(np.ones((1, 4, 6)))}


@pytest.mark.parametrize(("shape", "axes"), SHAPES)
@pytest.mark.parametrize("centred", [True, False])
def test_eva_takes_the_principal_components_of_the_inputs(
    centred: bool, shape: tuple[int, ...], axes: tuple[str, ...]
) -> None:
    leaf = random(*shape)
    seen = seen_inputs(to_matrices(leaf, axes))
    init = lora_jax.init.eva({"kernel": gathered_moments(seen)}, centred=centred)
    weight = lora_jax.wrap({"kernel": leaf}, "kernel", rank=3, axes={"kernel": axes}, init=init)[
        "kernel"
    ]
    _, A, B = as_matrices(weight)
    assert not B.any()
    for rows, columns in zip(seen, A, strict=True):
        _, _, Vt = np.linalg.svd(rows - rows.mean(0) if centred else rows, full_matrices=False)
        assert_agree(abs(columns), abs(Vt[:3].T), tolerance=1e-4)
        assert (columns[abs(columns).argmax(0), range(3)] > 0).all()


def test_whitened_components_give_a_variance_of_one() -> None:
    rows = seen_inputs(np.empty((1, 12, 10)))
    leaf = jnp.ones((12, 10))
    init = lora_jax.init.eva({"kernel": gathered_moments(rows)}, whiten=True)
    lora_A = lora_jax.wrap({"kernel": leaf}, "kernel", rank=4, init=init)["kernel"].lora_A
    assert_agree(np.cov((rows[0] @ lora_A).T, bias=True), np.eye(4), tolerance=1e-4)


@pytest.mark.parametrize(("shape", "axes"), SHAPES)
@pytest.mark.parametrize(
    ("direction", "of_A", "of_B", "gamma"),
    [
        ("ArB2r", [0, 1, 2], [3, 4, 5], 16.0),
        ("A2rBr", [3, 4, 5], [0, 1, 2], 4.0),
        ("ArBr", [1, 3, 5], [0, 2, 4], None),
    ],
)
def test_lora_ga_takes_the_singular_vectors_of_the_gradient(
    direction: Any,
    of_A: list[int],
    of_B: list[int],
    gamma: float | None,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
) -> None:
    leaf = random(*shape)
    init = lora_jax.init.lora_ga({"kernel": a_gradient(leaf)}, direction=direction, gamma=gamma)
    weight = lora_jax.wrap(
        {"kernel": leaf}, "kernel", rank=3, alpha=1.5, axes={"kernel": axes}, init=init
    )["kernel"]
    gradients = np.asarray(to_matrices(a_gradient(leaf), axes), np.float64)
    matrices = np.asarray(to_matrices(leaf, axes), np.float64)
    for G, W, base, A, B in zip(gradients, matrices, *as_matrices(weight), strict=True):
        U, _, Vt = np.linalg.svd(G, full_matrices=False)
        size = 1 if gamma is None else (G.shape[1] / gamma**2) ** 0.25
        assert_agree(abs(A), size * abs(U[:, of_A]), tolerance=1e-4)
        assert_agree(abs(B), size * abs(Vt[of_B]), tolerance=1e-4)
        assert_agree(base, W - 0.5 * A @ B)
        for vectors in (A.T, B):
            assert (vectors.max(axis=1) == abs(vectors).max(axis=1)).all()


def test_the_first_step_of_lora_ga_is_the_best_approximation_of_the_gradient() -> None:
    params = {"kernel": random(12, 10)}
    x, y = (random(*shape, seed=seed) for seed, shape in ((1, (20, 12)), (2, (20, 10))))

    def loss(params: Any) -> jax.Array:
        return jnp.mean((x @ params["kernel"] - y) ** 2)

    G = jax.grad(loss)(params)["kernel"]
    init = lora_jax.init.lora_ga({"kernel": G}, gamma=None)
    wrapped = lora_jax.wrap(params, "kernel", rank=2, alpha=2.0, init=init)
    adapters, frozen = lora_jax.split(wrapped)
    gradients = jax.grad(lambda a: lora_jax.adapt(loss)(lora_jax.combine(a, frozen)))(adapters)
    rate = 1e-3
    stepped = jax.tree.map(lambda value, slope: value - rate * slope, adapters, gradients)
    after = lora_jax.merge(lora_jax.combine(stepped, frozen))["kernel"]
    U, S, Vt = np.linalg.svd(np.asarray(G))
    best = U[:, :4] * S[:4] @ Vt[:4]
    assert_agree((params["kernel"] - after) / rate, best, tolerance=0.002)


@pytest.mark.parametrize(
    "make",
    [
        lora_jax.init.eva,
        functools.partial(lora_jax.init.eva, whiten=True),
        lora_jax.init.corda,
        functools.partial(lora_jax.init.corda, mode="kpm"),
    ],
)
def test_degenerate_inputs_give_finite_factors(make: Callable[..., Any]) -> None:
    gathered = [gathered_moments(rows[None]) for rows in DEGENERATE_INPUTS.values()]
    moments = jax.tree.map(lambda *parts: jnp.concatenate(parts), *gathered)
    params = {"kernel": random(len(gathered), 6, 5)}
    axes = {"kernel": ("batch", "in", "out")}
    wrapped = lora_jax.wrap(params, "kernel", rank=3, axes=axes, init=make({"kernel": moments}))
    assert all(jnp.isfinite(array).all() for array in jax.tree.leaves(wrapped))
    assert_agree(lora_jax.merge(wrapped)["kernel"], params["kernel"])


def test_a_zero_gradient_gives_finite_factors() -> None:
    params = {"kernel": jnp.ones((6, 6))}
    init = lora_jax.init.lora_ga({"kernel": jnp.zeros((6, 6))})
    wrapped = lora_jax.wrap(params, "kernel", rank=3, init=init)
    assert all(jnp.isfinite(array).all() for array in jax.tree.leaves(wrapped))


def test_an_initialiser_of_one_target_may_differ() -> None:
    params = {"a": random(6, 6), "b": jnp.ones((6, 6))}
    init = lora_jax.init.lora_ga({"a": jnp.eye(6), "b": None})
    wrapped = lora_jax.wrap(params, {"a": {"init": init}, "b": {}}, rank=2)
    assert wrapped["a"].base is not params["a"]
    assert wrapped["b"].base is params["b"]


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lora_jax.init.eva([1]), "`moments` is"),
        (lambda: lora_jax.init.corda({"kernel": jnp.ones((6, 6))}), "`moments` has .*'kernel'"),
        (lambda: lora_jax.init.corda(MOMENTS, mode="cpm"), "`mode` is 'cpm'.*'ipm'"),
        (lambda: lora_jax.init.corda(MOMENTS, damping=0.0), "`damping` is 0.0"),
        (lambda: lora_jax.init.lora_ga({}, direction="AB"), "`direction` is 'AB'.*'ArB2r'"),
        (lambda: lora_jax.init.lora_ga({}, gamma=0.0), "`gamma` is 0.0"),
    ],
)
def test_wrong_data_and_options_raise(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (
            lora_jax.init.eva({"other": MOMENTS["kernel"]}),
            "`init` has no statistics of 'kernel'.*'other'.*targets",
        ),
        (lora_jax.init.lora_ga({}), "`init` has no statistics of 'kernel'"),
        (
            lora_jax.init.eva({"kernel": gathered_moments(np.ones((2, 4, 6)))}),
            "'kernel'.*axis of 1",
        ),
        (lora_jax.init.eva({"kernel": gathered_moments(np.ones((1, 4, 5)))}), r"expected \(6, 6\)"),
        (
            lora_jax.init.corda({"kernel": gathered_moments(np.ones((1, 4, 5)))}),
            r"`moments`.*\(6, 6\)",
        ),
        (lora_jax.init.lora_ga({"kernel": jnp.ones((5, 6))}), r"\(5, 6\) for 'kernel'.*\(6, 5\)"),
        (lora_jax.init.lora_ga({"kernel": jnp.ones((6, 5))}), "`rank` is 3.*at most 2 fits"),
        ("eva", r"`init` is 'eva', which needs data.*eva\(moments\)"),
        (lora_jax.init.lora_ga, r"`init` is 'lora_ga'.*lora_ga\(gradients\)"),
        (lora_jax.init.corda, r"`init` is 'corda'.*corda\(moments\)"),
    ],
)
def test_data_that_does_not_fit_the_weight_raises(init: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora_jax.wrap({"kernel": jnp.ones((6, 5))}, "kernel", rank=3, init=init)


def test_statistics_are_mapped_over_with_the_matrices() -> None:
    axes = ("out", "batch", "in")
    leaf = random(5, 3, 4)
    matrices = to_matrices(leaf, axes)

    def init(key: Any, weight2d: Any, rank: int, scale: float, statistics: Any) -> Any:
        lora_A = statistics["offset"] + weight2d[:, :rank]
        return weight2d, lora_A, statistics["weights"][:rank]

    statistics = {"offset": jnp.arange(3.0), "weights": jnp.ones((3, 4, 5))}
    made = lora_jax.init.DataInitializer(init, {"kernel": statistics})
    weight = lora_jax.wrap({"kernel": leaf}, "kernel", rank=2, axes={"kernel": axes}, init=made)
    expected = matrices[:, :, :2] + jnp.arange(3.0)[:, None, None]
    np.testing.assert_array_equal(weight["kernel"].lora_A, expected)
