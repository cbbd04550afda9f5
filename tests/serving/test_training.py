"""A bank that is trained in place: the gradients and the outputs are those of its adapters."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax.checkpoint import TrainingCheckpoints
from tests.agreement import assert_agree
from tests.serving.models import DENSE, SCANNED, Model, dense, one_by_one

IDS = jnp.array([0, 1, 0, 1, 1, -1, 0])


def bank_of(model: Model, **options: Any) -> Any:
    adapters = [model.adapter(seed, rank=1 + seed, **options) for seed in range(2)]
    return lora_jax.serving.bank(adapters, capacity=3)


def loss(model: Model, bank: Any) -> jax.Array:
    return jnp.mean(lora_jax.serving.adapt(model.fn)(bank, IDS, model.x) ** 2)


def steps(model: Model, adapters: Any, frozen: Any, count: int = 3) -> Any:
    """Returns the adapters after some steps of gradient descent."""
    gradient = jax.grad(lambda half: loss(model, lora_jax.combine(half, frozen)))

    @jax.jit
    def step(adapters: Any) -> Any:
        return jax.tree.map(lambda x, dx: x - 0.3 * dx, adapters, gradient(adapters))

    for _ in range(count):
        adapters = step(adapters)
    return adapters


@functools.cache
def serve(model: Model) -> Callable[..., jax.Array]:
    return jax.jit(lora_jax.serving.adapt(model.fn))


def assert_serves_its_adapters(model: Model, bank: Any) -> None:
    """Asserts law 7: a batch over the bank is a loop over its adapters."""
    adapters = {place: lora_jax.serving.select(bank, place) for place in set(IDS.tolist())}
    expected = one_by_one(model, [adapters[place] for place in IDS.tolist()], model.x)
    assert_agree(serve(model)(bank, IDS, model.x), expected)


@pytest.mark.parametrize("options", [{}, {"dora": True}], ids=str)
@pytest.mark.parametrize("model", [DENSE, SCANNED], ids=lambda model: model.name)
class TestInPlace:
    def test_serves_what_was_trained(self, model: Model, options: dict[str, Any]) -> None:
        adapters, frozen = lora_jax.split(bank_of(model, **options))
        trained = lora_jax.combine(steps(model, adapters, frozen), frozen)
        assert_serves_its_adapters(model, trained)
        # The premise: the norms have changed by far more than rounding.
        if options:
            before, after = (
                dense(lora_jax.serving.select(each, 0))
                for each in (bank_of(model, dora=True), trained)
            )
            assert any(np.abs(after[name] - before[name]).max() > 1e-2 for name in before)

    def test_has_the_gradients_of_each(self, model: Model, options: dict[str, Any]) -> None:
        bank = bank_of(model, **options)
        adapters, frozen = lora_jax.split(bank)
        actual = jax.jit(jax.grad(lambda half: loss(model, lora_jax.combine(half, frozen))))(
            adapters
        )

        def loss_of_each(trees: Any) -> jax.Array:
            outputs = [
                lora_jax.adapt(model.fn)(trees[place], model.x[n : n + 1])
                for n, place in enumerate(IDS.tolist())
            ]
            return jnp.mean(jnp.concatenate(outputs) ** 2)

        trees = {place: lora_jax.serving.select(bank, place) for place in (-1, 0, 1)}
        expected = jax.jit(jax.grad(loss_of_each))(trees)
        for name, node in lora_jax.labels(bank).items():
            for leaf in ("lora_A", "lora_B", "magnitude") if node != "frozen" else ():
                if getattr(actual[name], leaf) is not None:
                    each = jnp.stack([getattr(expected[place][name], leaf) for place in (0, 1)])
                    assert_agree(getattr(actual[name], leaf)[:2], each, tolerance=2e-5)

    def test_goes_on_as_a_bank(self, model: Model, options: dict[str, Any]) -> None:
        """Without norms, adapters are put in and taken out as with them, and `stack` keeps them."""
        bank = lora_jax.combine(*lora_jax.split(bank_of(model, **options)))
        bank, place = lora_jax.serving.add(bank, model.adapter(5, rank=2, **options))
        assert place == 2
        bank = lora_jax.serving.remove(bank, 0)
        bank = lora_jax.serving.replace(bank, model.adapter(6, rank=1, **options), adapter_id=0)
        assert_serves_its_adapters(model, bank)
        assert_serves_its_adapters(model, lora_jax.serving.remove(bank, 2))
        again = lora_jax.serving.bank([lora_jax.serving.select(bank, place) for place in range(3)])
        assert_serves_its_adapters(model, again)
        assert jax.tree.structure(again) == jax.tree.structure(bank_of(model, **options))


class TestBesideKeptNorms:
    @pytest.mark.parametrize("transform", [jax.grad, lambda f: jax.jit(jax.grad(f)), jax.jacfwd])
    def test_a_derivative_is_refused(self, transform: Any) -> None:
        bank = bank_of(DENSE, dora=True)
        with pytest.raises(ValueError, match=r"norms .*split\(bank\).*select\(bank, id\)"):
            transform(lambda bank: loss(DENSE, bank))(bank)

    def test_as_the_optimiser_of_a_whole_tree_takes_it(self) -> None:
        bank = bank_of(DENSE, dora=True)
        tx = lora_jax.optimizer(optax.sgd(0.1))
        with pytest.raises(ValueError, match="caches the norms"):
            tx.update(jax.grad(lambda tree: loss(DENSE, tree))(bank), tx.init(bank), bank)

    def test_what_does_not_train_them_is_not(self) -> None:
        """By its inputs a bank is differentiated as any function, and so are its magnitudes."""
        bank = bank_of(DENSE, dora=True)
        serve = lora_jax.serving.adapt(DENSE.fn)

        def of_inputs(x: jax.Array, bank: Any) -> jax.Array:
            return jnp.sum(serve(bank, IDS, x) ** 2)

        without = lora_jax.combine(*lora_jax.split(bank))
        actual, expected = (jax.jit(jax.grad(of_inputs))(DENSE.x, tree) for tree in (bank, without))
        assert_agree(actual, expected)

        def of_magnitudes(magnitudes: Any, bank: Any) -> jax.Array:
            nodes = {
                name: lora_jax.LoRABank(**{**vars(bank[name]), "magnitude": magnitude})
                for name, magnitude in magnitudes.items()
            }
            return of_inputs(DENSE.x, {**bank, **nodes})

        magnitudes = {name: bank[name].magnitude for name in ("W1", "W2")}
        actual, expected = (jax.grad(of_magnitudes)(magnitudes, tree) for tree in (bank, without))
        assert_agree(actual, expected)


def test_a_run_that_is_resumed_has_the_norms_of_its_factors(tmp_path: Any) -> None:
    adapters, frozen = lora_jax.split(bank_of(DENSE, dora=True))
    trained = lora_jax.combine(steps(DENSE, adapters, frozen, 1), frozen)
    with TrainingCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, trained, jnp.zeros(()))
        restored = checkpoints.restore(bank_of(DENSE, dora=True), jnp.zeros(())).wrapped
    assert restored["W1"].norm is not None
    assert_serves_its_adapters(DENSE, restored)
