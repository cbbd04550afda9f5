"""A weight with several changes: an adapter on a base that is an adapted weight itself."""

import dataclasses
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
from tests.arrays import random
from tests.trained import as_if_trained

# What the inner adapter and the outer one are.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora on lora": ({}, {}),
    "lora on dora": ({"dora": True}, {}),
    "dora on lora": ({}, {"dora": True}),
    "dora on dora": ({"dora": True}, {"dora": True}),
    "lora on frozen": ({"freeze": "lora_A"}, {}),
    "lora on pissa": ({"init": "pissa"}, {}),
    "another rank and scale": ({"rank": 3, "alpha": 5.0}, {"rank": 1}),
    "rows on lora": ({}, {"rows": [4, 1]}),
    "rows on dora": ({"dora": True}, {"rows": [4, 1]}),
    "rows on pissa": ({"init": "pissa"}, {"rows": [4, 1]}),
    "rows on rows": ({"rows": [1, 5]}, {"rows": [4, 1]}),
    "lora on rows": ({"rows": [4, 1]}, {}),
    "dora on rows": ({"rows": [4, 1]}, {"dora": True}),
}
PARAMS = {"W": random(6, 4), "b": random(4, seed=1)}
X = random(5, 6, seed=2)


def nested(outer: Any, inner: Any) -> Any:
    """Returns the adapters of one tree on the adapted weights of another."""
    return {**outer, "W": dataclasses.replace(outer["W"], base=inner["W"], squared_norm=None)}


def wrapped_of(kind: str) -> Any:
    inner, outer = (
        as_if_trained(
            lora_jax.wrap(PARAMS, "W", key=jax.random.key(n), **{"rank": 2, **options}), n
        )
        for n, options in enumerate(KINDS[kind])
    )
    return nested(outer, inner)


def on_dora(kind: str) -> bool:
    return bool(KINDS[kind][0].get("dora"))


def dense(weight: Any) -> Any:
    """Returns what a weight stands for, by the formula."""
    if not isinstance(weight, lora_jax.LoRAWeight):
        return weight
    lora_A = weight.lora_A
    if isinstance(lora_A, lora_jax.RowSelection):
        lora_A = lora_A.one_hot()
    value = dense(weight.base) + weight.scale * lora_A @ weight.lora_B
    if weight.magnitude is None:
        return value
    norm = jax.lax.stop_gradient(jnp.linalg.norm(value, axis=0))
    return (weight.magnitude / norm)[None] * value


def apply(params: Any, x: Any) -> Any:
    return jnp.sin(x @ params["W"] + params["b"][None])


def loss(fn: Any) -> Any:
    return lambda adapters, frozen: jnp.sum(fn(lora_jax.combine(adapters, frozen), X) ** 2)


def reference(wrapped: Any, x: Any) -> Any:
    return apply({**wrapped, "W": dense(wrapped["W"])}, x)


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_outputs_and_gradients(self, kind: str) -> None:
        wrapped = wrapped_of(kind)
        # A gain multiplies what it was made for, so that an inner DoRA weight is built.
        adapted = lora_jax.adapt(apply, on_materialize="ignore" if on_dora(kind) else "error")
        assert_agree(adapted(wrapped, X), reference(wrapped, X))
        halves = lora_jax.split(wrapped)
        assert_agree(jax.jit(jax.grad(loss(adapted)))(*halves), jax.grad(loss(reference))(*halves))

    def test_all_levels_train_but_what_is_frozen(self, kind: str) -> None:
        weight = lora_jax.labels(wrapped_of(kind))["W"]
        assert weight.base.base == weight.base.scale == weight.scale == "frozen"
        outer, inner = (set(jax.tree.leaves(each.lora_A)) for each in (weight, weight.base))
        assert outer == {"frozen" if kind.startswith("rows") else "lora_A"}
        assert inner == {"frozen" if kind.endswith(("frozen", "on rows")) else "lora_A"}
        assert weight.lora_B == weight.base.lora_B == "lora_B"

    def test_merge_and_unmerge(self, kind: str) -> None:
        wrapped = wrapped_of(kind)
        merged = lora_jax.merge(wrapped)
        assert_agree(merged["W"], dense(wrapped["W"]))
        if "dora" in kind:
            place = "W/base" if kind in ("lora on dora", "rows on dora") else "W"
            with pytest.raises(ValueError, match=f"'{place}' has a magnitude"):
                lora_jax.unmerge(merged, wrapped)
        else:
            back = lora_jax.unmerge(merged, wrapped)
            assert jax.tree.structure(back) == jax.tree.structure(wrapped)
            assert_agree(back["W"].base.base, wrapped["W"].base.base, size=1.0)

    def test_unwrap(self, kind: str) -> None:
        plain = lora_jax.unwrap(wrapped_of(kind))
        assert jax.tree.structure(plain) == jax.tree.structure(PARAMS)
        assert_agree(plain["W"], PARAMS["W"])

    def test_checkpoints(self, kind: str, tmp_path: Path) -> None:
        wrapped = wrapped_of(kind)
        lora_jax.save(tmp_path / "adapters", wrapped)
        restored = lora_jax.restore(tmp_path / "adapters", PARAMS)
        assert jax.tree.structure(restored) == jax.tree.structure(wrapped)
        saved, read = (lora_jax.split(tree)[0] for tree in (wrapped, restored))
        jax.tree.map(np.testing.assert_array_equal, saved, read)
        other = jax.tree.map(lambda leaf: leaf, wrapped)
        with TrainingCheckpoints(tmp_path / "run") as checkpoints:
            checkpoints.save(1, wrapped, 0)
            read = checkpoints.restore(other, 0).wrapped
        jax.tree.map(np.testing.assert_array_equal, wrapped, read)

    def test_summary_and_counts(self, kind: str) -> None:
        wrapped = wrapped_of(kind)
        counts = lora_jax.count_parameters(wrapped)
        leaves = jax.tree.leaves(lora_jax.split(wrapped)[0])
        assert counts.trainable == sum(leaf.size for leaf in leaves)
        assert counts.original == 6 * 4 + 4
        rows = lora_jax.summary(wrapped).splitlines()[2:4]
        assert [row.split()[0] for row in rows] == ["W/base", "W"]

    def test_explain(self, kind: str) -> None:
        report = lora_jax.explain(apply, wrapped_of(kind), X)
        assert [target.path for target in report.targets] == ["W", "W/base"]
        assert [use.path for use in report.materialized] == ["W/base"] * on_dora(kind)
        ranks = [options.get("rank", 2) for options in KINDS[kind][::-1]]
        assert [target.rank for target in report.targets] == ranks


@pytest.mark.parametrize("tx", [optax.sgd(0.1), lora_jax.updates.riemannian()], ids=["sgd", "r"])
def test_an_optimizer_updates_each_level_as_it_does_alone(tx: Any) -> None:
    wrapped = wrapped_of("lora on lora")
    gradient = jax.tree.map(lambda leaf: leaf * 0.5 + 1, wrapped)
    tx = lora_jax.optimizer(tx)
    updates, _ = tx.update(gradient, tx.init(wrapped), wrapped)
    for level in (lambda tree: tree["W"], lambda tree: tree["W"].base):
        own, own_gradient = (
            {"W": dataclasses.replace(level(tree), base=PARAMS["W"])}
            for tree in (wrapped, gradient)
        )
        expected, _ = tx.update(own_gradient, tx.init(own), own)
        for name in ("lora_A", "lora_B"):
            assert_agree(getattr(level(updates), name), getattr(expected["W"], name))


def test_a_file_of_peft_holds_one_adapter(tmp_path: Path) -> None:
    names = [peft.Rule("module.weight", "W"), peft.Rule("module.bias", "b")]
    with pytest.raises(CheckpointError, match="an adapter on another one at 'W'"):
        peft.save(tmp_path, wrapped_of("lora on lora"), names=names)


def test_banks_blends_and_other_ranks_stand_on_the_same_node() -> None:
    inner = as_if_trained(lora_jax.wrap(PARAMS, "W", rank=2), 1)
    singles = [nested(as_if_trained(lora_jax.wrap(PARAMS, "W", rank=n), n), inner) for n in (1, 2)]
    bank = lora_jax.serving.bank(singles)
    outputs = jax.jit(lora_jax.serving.adapt(apply))(bank, jnp.array([1, 0, -1, 1, 0]), X)
    expected = [reference(singles[n], X[i : i + 1]) for i, n in ((0, 1), (1, 0), (3, 1), (4, 0))]
    assert_agree(outputs[np.array([0, 1, 3, 4])], np.concatenate(expected))
    assert_agree(outputs[2:3], reference(inner, X[2:3]))
    blended = lora_jax.arithmetic.blend(singles, [0.5, -2.0])
    change = sum(
        w * (dense(each["W"]) - dense(inner["W"]))
        for w, each in zip([0.5, -2], singles, strict=True)
    )
    assert_agree(lora_jax.merge(blended)["W"], dense(inner["W"]) + change)
    active = lora_jax.serving.activate(bank, [0.5, -2.0])
    assert_agree(lora_jax.merge(active)["W"], lora_jax.merge(blended)["W"])
    grown = lora_jax.arithmetic.resize(singles[1], {"W$": 3})
    assert grown["W"].rank == 3
    assert grown["W"].base is singles[1]["W"].base
    assert_agree(lora_jax.merge(grown)["W"], dense(singles[1]["W"]))


def inner_of(**options: Any) -> Any:
    return as_if_trained(lora_jax.wrap(PARAMS, "W", rank=2, key=jax.random.key(5), **options), 5)


def outer_of(rank: int = 2, **options: Any) -> Any:
    return as_if_trained(lora_jax.wrap(PARAMS, "W", rank=rank, **options), rank)


@pytest.mark.parametrize("inner", [{}, {"init": "pissa"}, {"dora": True}], ids=str)
@pytest.mark.parametrize("outer", [{}, {"dora": True}], ids=str)
class TestBanksOnANode:
    def bank(self, inner: dict[str, Any], outer: dict[str, Any]) -> Any:
        base = inner_of(**inner)
        return lora_jax.serving.bank([nested(outer_of(n, **outer), base) for n in (1, 2)])

    def test_unwrap(self, inner: dict[str, Any], outer: dict[str, Any]) -> None:
        assert_agree(lora_jax.unwrap(self.bank(inner, outer))["W"], PARAMS["W"])

    def test_no_adapter_is_the_base_also_after_a_step(
        self, inner: dict[str, Any], outer: dict[str, Any]
    ) -> None:
        bank = self.bank(inner, outer)
        trained = as_if_trained(lora_jax.combine(*lora_jax.split(bank)), 9)
        serve = lora_jax.serving.adapt(apply, on_materialize="ignore")
        for each in (bank, trained):
            base = {**PARAMS, "W": dense(each["W"].base)}
            assert_agree(lora_jax.merge(lora_jax.serving.select(each, -1))["W"], base["W"])
            assert_agree(serve(each, [-1] * len(X), X), apply(base, X))

    def test_save_and_restore(
        self, inner: dict[str, Any], outer: dict[str, Any], tmp_path: Path
    ) -> None:
        bank = self.bank(inner, outer)
        lora_jax.save(tmp_path / "bank", bank)
        assert_identical(lora_jax.restore(tmp_path / "bank", PARAMS), bank)

    def test_resize(self, inner: dict[str, Any], outer: dict[str, Any]) -> None:
        bank = self.bank(inner, outer)
        resized = lora_jax.arithmetic.resize(bank, {"W/base": 1})
        assert (resized["W"].rank, resized["W"].base.rank) == (2, 1)
        for slot in range(2):
            single = lora_jax.serving.select(resized, slot)["W"]
            x, cut = jnp.eye(6), {**PARAMS, "W": dense(single)}
            served = lora_jax.serving.adapt(apply, on_materialize="ignore")(resized, [slot] * 6, x)
            assert_agree(served, apply(cut, x))


def test_layers_of_a_stack_on_a_node() -> None:
    params, axes = {"W": random(3, 6, 4)}, {"W": ("batch", "in", "out")}

    def wrapped(**options: Any) -> Any:
        return as_if_trained(lora_jax.wrap(params, "W", rank=2, axes=axes, **options))

    inner = wrapped()
    parts = [nested(wrapped(layers=layers, dora=True), inner) for layers in ((0,), (1, 2))]
    bank = lora_jax.serving.bank(parts)
    for slot, part in enumerate(parts):
        selected = lora_jax.serving.select(bank, slot)
        assert_agree(lora_jax.merge(selected)["W"], lora_jax.merge(part)["W"])


def test_resize_and_on_original_base_reach_each_level() -> None:
    wrapped = nested(outer_of(), inner_of(init="pissa"))
    resized = lora_jax.arithmetic.resize(wrapped, 3)["W"]
    assert (resized.rank, resized.base.rank) == (3, 3)
    assert_agree(dense(resized), dense(wrapped["W"]))
    original = lora_jax.arithmetic.on_original_base(wrapped)["W"]
    assert_agree(original.base.base, PARAMS["W"])
    assert_agree(dense(original), dense(wrapped["W"]))


def bank_node() -> Any:
    return lora_jax.serving.bank([inner_of()])["W"]


REFUSED: dict[str, tuple[Any, str]] = {
    "an initialiser that changes the base": (
        lambda: nested(outer_of(init="pissa"), inner_of()),
        "'W' stands on another LoRAWeight, and its initialiser changes its base",
    ),
    "a weight in full": (
        lambda: nested(outer_of(), {"W": lora_jax.FullWeight(PARAMS["W"], PARAMS["W"])}),
        "'W' is a LoRAWeight on a FullWeight",
    ),
    "a bank": (lambda: nested(outer_of(), {"W": bank_node()}), "'W' is a LoRAWeight on a LoRABank"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize(
    "function",
    [
        lambda tree, _: lora_jax.adapt(apply)(tree, X),
        lambda tree, _: lora_jax.explain(apply, tree, X),
        lambda tree, _: lora_jax.merge(tree),
        lambda tree, _: lora_jax.summary(tree),
        lambda tree, _: lora_jax.serving.bank([tree]),
        lambda tree, _: lora_jax.arithmetic.resize(tree, 1),
        lambda tree, _: lora_jax.arithmetic.on_original_base(tree),
        lambda tree, folder: lora_jax.save(folder / "adapters", tree),
    ],
    ids=["adapt", "explain", "merge", "summary", "bank", "resize", "original", "save"],
)
def test_bases_that_no_node_can_have(kind: str, function: Any, tmp_path: Path) -> None:
    made, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        function(made(), tmp_path)


def test_a_cut_weight_keeps_its_cut_at_each_level() -> None:
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "d"))
    params = {**PARAMS, "W": jax.device_put(PARAMS["W"], cut)}
    wrapped = nested(lora_jax.wrap(params, "W", rank=2), lora_jax.wrap(params, "W", rank=1))
    assert lora_jax.merge(wrapped)["W"].sharding == cut
    assert_agree(jax.jit(lora_jax.adapt(apply))(wrapped, X), apply(PARAMS, X))
