"""Gram matrices where they are delicate: zeros, narrow dtypes, stacks of adapters, cut factors."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax
from lora_jax.updates import lora_fa, riemannian
from tests.agreement import assert_agree

METHODS: dict[str, Callable[..., Any]] = {
    "lora_fa": lambda **options: lora_fa(optax.sgd(1.0), **options),
    "riemannian": lambda **options: optax.chain(riemannian(**options), optax.sgd(1.0)),
}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def array(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def weight_of(lora_A: Any, lora_B: Any, scale: Any = 2.0, axes: Any = ("in", "out")) -> Any:
    shape = (*lora_A.shape[:-1], *lora_B.shape[1:])
    return lora_jax.LoRAWeight(jnp.zeros(shape), lora_A, lora_B, jnp.asarray(scale), axes)


def gradients_of(weight: Any) -> Any:
    """Returns those of a linear function of the weight: zero where the other factor is."""

    def value(weight: Any) -> jax.Array:
        change = weight.lora_A.astype(jnp.float32) @ weight.lora_B.astype(jnp.float32)
        return jnp.sum(array(*weight.shape, seed=3) * weight.scale * change)

    return jax.grad(value)(weight)


def updates_of(tx: Any, weight: Any, gradients: Any = None) -> Any:
    tx = lora_jax.optimizer(tx)
    gradients = gradients_of(weight) if gradients is None else gradients
    return tx.update(gradients, tx.init(weight), weight)[0]


def assert_finite(tree: Any) -> None:
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("zeros", ["lora_A", "lora_B"])
@each_method
def test_a_factor_of_zeros_with_a_damping_that_rounds_to_zero(method: Any, zeros: str) -> None:
    weight = weight_of(array(6, 2), array(2, 5))
    weight = dataclasses.replace(weight, **{zeros: jnp.zeros_like(getattr(weight, zeros))})
    assert_finite(updates_of(method(damping=1e-50), weight))


def test_a_damping_that_is_injected_in_the_dtype_of_narrow_factors() -> None:
    """Optax makes it an array of the gradient's dtype, and float16 has no 1e-9."""
    weight = weight_of(array(6, 2, dtype=jnp.float16), jnp.zeros((2, 5), jnp.float16))
    updates = updates_of(optax.inject_hyperparams(riemannian)(damping=1e-9), weight)
    assert updates.lora_B.dtype == jnp.float16
    assert_finite(updates)


@each_method
def test_a_scale_of_zero(method: Any) -> None:
    """An adapter that is turned off has gradients of zero, and stays as it is."""
    updates = updates_of(method(), weight_of(array(6, 2), array(2, 5), scale=0.0))
    assert_agree((updates.lora_A, updates.lora_B), (jnp.zeros((6, 2)), jnp.zeros((2, 5))))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@each_method
def test_narrow_factors_are_inverted_in_float32(method: Any, dtype: Any) -> None:
    """Columns that are all but parallel: their Gram matrix is singular in the narrow dtype."""
    column = array(64, 1, seed=1)
    lora_A = jnp.concatenate([column, column + 0.05 * array(64, 1, seed=2)], axis=1)
    weight = weight_of(lora_A.astype(dtype), array(2, 5, dtype=dtype))
    gradients = gradients_of(weight)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (weight, gradients))
    found = updates_of(method(), weight, gradients)
    assert (found.lora_A.dtype, found.lora_B.dtype) == (dtype, dtype)
    assert_agree(found.lora_B, updates_of(method(), *wide).lora_B, tolerance=1e-2)


@each_method
def test_a_bank_of_other_ranks(method: Any) -> None:
    """The bank fills the smaller rank up with zeros, which stay zeros."""
    weights = [
        dataclasses.replace(
            lora_jax.wrap({"kernel": array(6, 5)}, "kernel", rank=rank)["kernel"],
            lora_B=array(rank, 5, seed=rank),
        )
        for rank in (1, 3)
    ]
    bank = lora_jax.serving.bank([{"kernel": weight} for weight in weights])["kernel"]
    gradients = [gradients_of(weight) for weight in weights]
    together = lora_jax.serving.bank(
        [
            {"kernel": dataclasses.replace(each, base=weight.base, scale=weight.scale)}
            for each, weight in zip(gradients, weights, strict=True)
        ]
    )["kernel"]
    found = updates_of(method(), bank, together)
    for place, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
        expected = updates_of(method(), weight, gradient)
        rank = weight.rank
        assert_agree(found.lora_A[place, :, :rank], expected.lora_A)
        assert_agree(found.lora_B[place, :rank], expected.lora_B)
        assert not found.lora_A[place, :, rank:].any()
        assert not found.lora_B[place, rank:].any()


CUTS: dict[str, tuple[Any, PartitionSpec, PartitionSpec]] = {
    "inputs": (("in", "out"), PartitionSpec("x", None), PartitionSpec(None, None)),
    "outputs": (("in", "out"), PartitionSpec(None, None), PartitionSpec(None, "y")),
    "both": (("in", "out"), PartitionSpec("x", None), PartitionSpec(None, "y")),
    "layers and heads": (
        ("batch", "in", "out", "out"),
        PartitionSpec("x", None, None),
        PartitionSpec("x", None, "y", None),
    ),
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(("axes", "A_spec", "B_spec"), CUTS.values(), ids=CUTS)
@each_method
def test_cut_factors(method: Any, axes: Any, A_spec: Any, B_spec: Any, kind: AxisType) -> None:
    """Sums over a cut axis, on meshes where the compiler cuts and where types say how."""
    lora_A, lora_B = array(4, 8, 2), array(4, 2, 8, 4, seed=1)
    if len(axes) == 2:
        lora_A, lora_B = lora_A[0], lora_B[0, :, :, 0]
    base = jnp.zeros([8] * 2 if len(axes) == 2 else (4, 8, 8, 4))
    weight = lora_jax.LoRAWeight(base, lora_A, lora_B, jnp.asarray(2.0), axes)
    gradients = dataclasses.replace(
        jax.tree.map(jnp.zeros_like, weight),
        lora_A=array(*lora_A.shape, seed=2),
        lora_B=array(*lora_B.shape, seed=3),
    )
    tx = lora_jax.optimizer(method())

    def step(weight: Any, gradients: Any) -> Any:
        updates, _ = tx.update(gradients, tx.init(weight), weight)
        return optax.apply_updates(weight, updates)

    expected = step(weight, gradients)
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))

    def cut(node: Any) -> Any:
        return dataclasses.replace(
            node,
            lora_A=jax.device_put(node.lora_A, NamedSharding(mesh, A_spec)),
            lora_B=jax.device_put(node.lora_B, NamedSharding(mesh, B_spec)),
        )

    with jax.set_mesh(mesh):
        after = jax.jit(step)(cut(weight), cut(gradients))
    assert_agree(jax.device_get(after), expected)
    for found, spec in ((after.lora_A, A_spec), (after.lora_B, B_spec)):
        assert found.sharding.is_equivalent_to(NamedSharding(mesh, spec), found.ndim)
