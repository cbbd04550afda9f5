"""Every public function, given a bank: it does to each adapter what it does to one, or refuses."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax.checkpoint import CheckpointError, TrainingCheckpoints
from lora_jax.exchange import peft
from tests.agreement import assert_agree, assert_identical
from tests.serving.models import DENSE, SCANNED, Model, dense, merged

KINDS: dict[str, tuple[Model, dict[str, Any]]] = {
    "lora": (DENSE, {}),
    "dora": (DENSE, {"dora": True}),
    "layers": (SCANNED, {}),
    "layers with dora": (SCANNED, {"dora": True, "layers": (0, 2)}),
}
CAPACITY = 3


@functools.cache
def adapters_of(kind: str, first_seed: int = 0) -> list[Any]:
    model, options = KINDS[kind]
    return [model.adapter(first_seed + n, rank=1 + n, **options) for n in range(2)]


@functools.cache
def bank_of(kind: str) -> Any:
    return lora_jax.serving.bank(adapters_of(kind), capacity=CAPACITY)


def names_of(model: Model) -> list[peft.Rule]:
    return [peft.Rule(f"module.{name}", name, axes=model.axes.get(name)) for name in model.params]


def assert_each_is(bank: Any, adapters: list[Any]) -> None:
    """Asserts that the bank's places hold what computes as these adapters do."""
    for place, adapter in enumerate(adapters):
        assert_agree(merged(lora_jax.serving.select(bank, place)), dense(adapter))


SINGLE = r"'W1?' holds 3 adapters; expected one\..*serving\.select\(bank, id\)"
PLAIN = r"`params` is wrapped already at .*unwrap\(params\)"

# What takes one adapter, or none, says so.
REFUSED: dict[str, tuple[Callable[[Any, Model, Path], Any], str]] = {
    "adapt": (lambda bank, model, _: lora_jax.adapt(model.fn)(bank, model.x), SINGLE),
    "explain": (lambda bank, model, _: lora_jax.explain(model.fn, bank, model.x), SINGLE),
    "merge": (lambda bank, *_: lora_jax.merge(bank), SINGLE),
    "unmerge": (lambda bank, model, _: lora_jax.unmerge(model.params, bank), SINGLE),
    "stack": (lambda bank, *_: lora_jax.serving.bank([bank]), SINGLE),
    "blend": (lambda bank, *_: lora_jax.arithmetic.blend([bank], [1.0]), SINGLE),
    "add_adapter": (lambda bank, *_: lora_jax.serving.add(bank, bank), SINGLE),
    "replace": (
        lambda bank, *_: lora_jax.serving.replace(bank, bank, adapter_id=0),
        SINGLE,
    ),
    "wrap": (lambda bank, *_: lora_jax.wrap(bank, "W.*"), PLAIN),
    "infer_axes": (lambda bank, model, _: lora_jax.infer_axes(model.fn, bank, model.x), PLAIN),
    "input_moments": (
        lambda bank, model, _: lora_jax.init.input_moments(
            model.fn, bank, [(model.x,)], targets="W.*"
        ),
        PLAIN,
    ),
    "extract": (
        lambda bank, model, _: lora_jax.arithmetic.extract(
            model.params, bank, "W.*", rank=1, axes=model.axes
        ),
        "`tuned` has a different structure from `params`",
    ),
    "peft.save": (
        lambda bank, model, path: peft.save(path, bank, names=names_of(model)),
        r"holds several adapters at 'W.*save\(path, serving\.select\(bank, id\)",
    ),
}


@pytest.mark.parametrize("function", REFUSED)
@pytest.mark.parametrize("kind", KINDS)
def test_what_takes_one_adapter_refuses(kind: str, function: str, tmp_path: Path) -> None:
    call, message = REFUSED[function]
    with pytest.raises((ValueError, CheckpointError), match=message):
        call(bank_of(kind), KINDS[kind][0], tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
class TestTakesABank:
    def test_unwrap(self, kind: str) -> None:
        assert_identical(lora_jax.unwrap(bank_of(kind)), dict(KINDS[kind][0].params))

    def test_on_original_base(self, kind: str) -> None:
        assert_identical(lora_jax.arithmetic.on_original_base(bank_of(kind)), bank_of(kind))

    @pytest.mark.parametrize("rank", [1, 4])
    def test_resize(self, kind: str, rank: int) -> None:
        resized = lora_jax.arithmetic.resize(bank_of(kind), rank)
        assert_each_is(
            resized, [lora_jax.arithmetic.resize(each, rank) for each in adapters_of(kind)]
        )
        assert lora_jax.serving.ids(resized)[:2] == (0, 1)
        assert_agree(merged(lora_jax.serving.select(resized, -1)), dict(KINDS[kind][0].params))

    def test_save_and_restore(self, kind: str, tmp_path: Path) -> None:
        lora_jax.save(tmp_path / "bank", bank_of(kind))
        assert_identical(lora_jax.restore(tmp_path / "bank", KINDS[kind][0].params), bank_of(kind))

    def test_training_checkpoints(self, kind: str, tmp_path: Path) -> None:
        other = lora_jax.serving.bank(adapters_of(kind, 7), capacity=CAPACITY)
        with TrainingCheckpoints(tmp_path) as checkpoints:
            checkpoints.save(1, bank_of(kind), 0)
            assert_identical(checkpoints.restore(other, 0).wrapped, bank_of(kind))

    def test_summary_and_counts(self, kind: str) -> None:
        bank, same_rank = bank_of(kind), lora_jax.serving.select(bank_of(kind), 0)
        counts, single = map(lora_jax.count_parameters, (bank, same_rank))
        assert counts.trainable == CAPACITY * single.trainable
        assert counts.original == single.original
        assert f"{counts.trainable:,} train" in lora_jax.summary(bank)

    def test_labels_and_split(self, kind: str) -> None:
        bank, single = bank_of(kind), lora_jax.serving.select(bank_of(kind), 0)
        for name, node in lora_jax.labels(single).items():
            for part in ("lora_A", "lora_B", "scale", "magnitude") if node != "frozen" else ():
                assert getattr(lora_jax.labels(bank)[name], part) == getattr(node, part)
        adapters, frozen = lora_jax.split(bank)
        both = lora_jax.combine(adapters, frozen)
        assert_each_is(both, adapters_of(kind))
        assert len(jax.tree.leaves(adapters)) == len(jax.tree.leaves(lora_jax.split(single)[0]))

    @pytest.mark.parametrize(
        "tx",
        [
            optax.sgd(0.1, momentum=0.9),
            lora_jax.updates.riemannian(),
            lora_jax.updates.lora_fa(optax.sgd(0.1)),
        ],
        ids=["sgd", "riemannian", "lora_fa"],
    )
    def test_optimizer(self, kind: str, tx: Any) -> None:
        """The update of each adapter is that which it gets alone."""
        bank = lora_jax.combine(*lora_jax.split(bank_of(kind)))
        tx = lora_jax.optimizer(tx)
        first_update = jax.jit(lambda gradient, tree: tx.update(gradient, tx.init(tree), tree)[0])
        gradient = jax.tree.map(
            lambda leaf: jnp.asarray(np.asarray(leaf) * np.float32(0.5) + np.float32(1)), bank
        )
        updates = first_update(gradient, bank)
        for place in range(2):
            own, own_gradient, update = (
                lora_jax.serving.select(each, place) for each in (bank, gradient, updates)
            )
            expected = first_update(own_gradient, own)
            actual, expected = (lora_jax.split(each)[0] for each in (update, expected))
            assert_agree(actual, expected)
