"""Adapters of single rows: what `wrap(..., rows=...)` makes, and what stands around it."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax
from lora_jax.checkpoint import TrainingCheckpoints
from lora_jax.exchange import gguf, peft
from tests.agreement import assert_agree, assert_identical
from tests.arrays import random
from tests.rows import IDS, PARAMS, ROWS, adapted, beside_low_rank, loss, model, wrapped_params
from tests.trained import as_if_trained


class TestWrapped:
    def test_holds_no_one_hot_matrix(self) -> None:
        weight = wrapped_params()["embed"]["table"]
        assert weight.lora_A.rows.tolist() == ROWS
        assert weight.lora_A.rows.dtype == jnp.int32
        assert (weight.lora_A.shape, weight.lora_A.ndim, weight.rank) == ((40, 3), 2, 3)
        assert_identical(weight.lora_B, jnp.zeros((3, 6)))
        assert (weight.scale, weight.axes, weight.frozen) == (1, ("in", "out"), ("lora_A",))
        assert sum(leaf.size for leaf in jax.tree.leaves(weight)) == 40 * 6 + 3 + 3 * 6 + 1

    def test_stands_for_one(self) -> None:
        one_hot = wrapped_params()["embed"]["table"].lora_A.one_hot()
        np.testing.assert_array_equal(one_hot, np.eye(40)[:, ROWS])

    @pytest.mark.parametrize("rows", [ROWS, tuple(ROWS), np.array(ROWS), np.array(ROWS, np.uint8)])
    def test_takes_any_sequence(self, rows: Any) -> None:
        assert_identical(wrapped_params({"embed": {"rows": rows}}), wrapped_params())
        assert_identical(wrapped_params("embed", rows=rows), wrapped_params())

    def test_settings_of_low_rank_adapters_have_no_effect(self) -> None:
        others = {"alpha": 7.0, "rslora": True, "init": "pissa", "freeze": "lora_A"}
        assert_identical(wrapped_params(**others), wrapped_params())

    @pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
    def test_dtype(self, dtype: Any) -> None:
        params = {"table": PARAMS["embed"]["table"].astype(jnp.bfloat16)}
        weight = lora_jax.wrap(params, "table", rows=ROWS, dtype=dtype)["table"]
        assert weight.lora_B.dtype == (dtype or jnp.float32)
        assert weight.scale.dtype == jnp.float32

    def test_of_an_output_layer(self) -> None:
        params = {"head": {"kernel": random(6, 40)}}
        wrapped = as_if_trained(
            lora_jax.wrap(params, "head", rows=ROWS, axes={"head/kernel": ("out", "in")})
        )
        assert wrapped["head"]["kernel"].lora_B.shape == (3, 6)
        x = random(5, 6, seed=2)
        actual = lora_jax.adapt(lambda params, x: x @ params["head"]["kernel"])(wrapped, x)
        expected = np.array(x @ params["head"]["kernel"])
        expected[:, ROWS] += x @ wrapped["head"]["kernel"].lora_B.T
        assert_agree(actual, expected)

    def test_of_shapes_is_shapes(self) -> None:
        shapes = jax.eval_shape(lambda: PARAMS)
        expected = jax.eval_shape(wrapped_params)
        assert jax.tree.leaves(wrapped_params(params=shapes)) == jax.tree.leaves(expected)


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "a row twice": ({"rows": [3, 5, 3]}, ValueError, "names '3' more than once"),
    "a row beyond the table": ({"rows": [3, 40]}, ValueError, r"'40'.*below 40.*jnp.concatenate"),
    "a negative row": ({"rows": [-1]}, ValueError, "counted from 0"),
    "no row": ({"rows": []}, ValueError, "at least one row"),
    "numbers with a point": ({"rows": [1.5]}, TypeError, "expected whole numbers"),
    "one number": ({"rows": 3}, TypeError, "expected whole numbers"),
    "text": ({"rows": "3"}, TypeError, "expected whole numbers"),
    "flags": ({"rows": [True]}, TypeError, "expected whole numbers"),
    "dora": ({"rows": [3], "dora": True}, ValueError, "`dora` is True for 'embed/table'"),
    "layers": ({"rows": [3], "layers": [0]}, ValueError, r"`layers` is \(0,\) for 'embed/table'"),
    "lora_B frozen": (
        {"rows": [3], "freeze": "lora_B"},
        ValueError,
        "`freeze` is .* 'embed/table'",
    ),
    "a rank": ({"rows": [3], "rank": 4}, ValueError, "overrides 'rank' beside 'rows'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_wrap_refuses(kind: str) -> None:
    overrides, error, message = REFUSED[kind]
    with pytest.raises(error, match=message):
        lora_jax.wrap(PARAMS, {"embed": overrides})


def test_weights_that_have_no_rows() -> None:
    params = {"stack": random(3, 6, 4)}
    for axes in (("batch", "in", "out"), ("in", "out", "out")):
        with pytest.raises(ValueError, match="table of two axes"):
            lora_jax.wrap(params, "stack", rows=[0], axes={"stack": axes})
    in_full = lora_jax.wrap(PARAMS, "query", rank=2, train="embed")
    with pytest.raises(ValueError, match="'embed/table', which is a FullWeight"):
        lora_jax.wrap(in_full, "embed", rows=[0])


class TestTwoCalls:
    def test_put_rows_on_top(self) -> None:
        below = wrapped_params("embed|query")
        above = lora_jax.wrap(below, {"embed": {"rows": ROWS}})
        assert_identical(above["query"], below["query"])
        assert above["embed"]["table"].base is below["embed"]["table"]
        trained = as_if_trained(above)
        assert_agree(adapted(trained, IDS), model(lora_jax.merge(trained), IDS))

    def test_may_add_other_rows(self) -> None:
        more = lora_jax.wrap(wrapped_params(), "embed", rows=[0, 1])
        assert [row.split()[0] for row in lora_jax.summary(more).splitlines()[2:4]] == [
            "embed/table/base",
            "embed/table",
        ]

    @pytest.mark.parametrize("options", [{}, {"train": "query"}], ids=["low rank", "in full"])
    def test_add_nothing_else(self, options: Any) -> None:
        targets = {"embed": {"rows": ROWS}} if options else {"query": {}, "embed": {"rows": ROWS}}
        with pytest.raises(ValueError, match="wrapped already at 'embed/table'.*adds rows"):
            lora_jax.wrap(wrapped_params(), targets, **options)


@pytest.mark.parametrize("made", [wrapped_params, beside_low_rank])
class TestAround:
    def test_labels_and_halves(self, made: Any) -> None:
        wrapped = as_if_trained(made())
        labels = lora_jax.labels(wrapped)["embed"]["table"]
        assert (labels.lora_A.rows, labels.lora_B) == ("frozen", "lora_B")
        adapters, frozen = lora_jax.split(wrapped)
        assert adapters["embed"]["table"].lora_A.rows is None
        assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(adapters))
        assert_identical(lora_jax.combine(adapters, frozen), wrapped)

    @pytest.mark.parametrize(
        "tx",
        [
            optax.adamw(1e-2),
            optax.chain(lora_jax.updates.riemannian(), optax.sgd(1e-3)),
            lora_jax.updates.lora_fa(optax.adamw(1e-2)),
            optax.chain(optax.scale_by_adam(), lora_jax.updates.lora_plus(4.0), optax.scale(-1e-2)),
        ],
        ids=["adamw", "riemannian", "lora_fa", "lora_plus"],
    )
    @pytest.mark.parametrize("whole", [True, False], ids=["whole", "half"])
    def test_trains(self, made: Any, tx: Any, whole: bool) -> None:
        wrapped = as_if_trained(made())
        tx = lora_jax.optimizer(tx)
        state = tx.init(wrapped)
        before = loss(adapted)(*lora_jax.split(wrapped))
        for _ in range(2):
            if whole:
                gradient = jax.grad(lambda w: loss(adapted)(w, _nothing(w)), allow_int=True)(
                    wrapped
                )
            else:
                halves = lora_jax.split(wrapped)
                gradient = lora_jax.combine(
                    jax.grad(loss(adapted))(*halves), jax.tree.map(jnp.zeros_like, halves[1])
                )
            with jax.numpy_dtype_promotion("standard"):
                updates, state = tx.update(gradient, state, wrapped)
                wrapped = optax.apply_updates(wrapped, updates)
        weight = wrapped["embed"]["table"]
        np.testing.assert_array_equal(weight.lora_A.rows, ROWS)
        assert_identical(lora_jax.unwrap(wrapped)["embed"], PARAMS["embed"])
        assert loss(adapted)(*lora_jax.split(wrapped)) < before

    def test_summary_and_counts(self, made: Any) -> None:
        wrapped = made()
        row = next(
            line
            for line in lora_jax.summary(wrapped).splitlines()
            if line.startswith("embed/table ")
        )
        assert re.split(r"  +", row) == [
            "embed/table", "(40, 6)", "in, out", "3 rows", "1", "float32", "18",
        ]  # fmt: skip
        assert lora_jax.summary(lora_jax.wrap(PARAMS, "embed", rows=[0])).count("1 row ") == 1
        low_rank = 0 if made is wrapped_params else 2 * (40 + 6) + 2 * (6 + 6)
        counts = lora_jax.count_parameters(wrapped)
        assert (counts.trainable, counts.original) == (18 + low_rank, 40 * 6 + 36)
        assert counts.trainable_bytes == 4 * counts.trainable

    def test_explain(self, made: Any) -> None:
        report = lora_jax.explain(model, made(), IDS)
        (target,) = (each for each in report.targets if each.path == "embed/table")
        assert target.selects_rows
        assert "3 rows" in str(report)
        assert [(use.primitive, use.how) for use in target.uses] == [
            ("gather", "factored"),
            ("dot_general", "factored"),
        ]
        lookup, head = target.uses
        assert (lookup.factored_flops, head.factored_flops) == (2 * IDS.size * 6, 2 * IDS.size * 18)
        assert head.dense_flops == 18

    def test_checkpoints(self, made: Any, tmp_path: Path) -> None:
        wrapped = as_if_trained(made())
        lora_jax.save(tmp_path / "adapters", wrapped)
        assert_identical(lora_jax.restore(tmp_path / "adapters", PARAMS), wrapped)
        with TrainingCheckpoints(tmp_path / "run") as checkpoints:
            checkpoints.save(1, wrapped, 0)
            assert_identical(checkpoints.restore(made(), 0).wrapped, wrapped)
        grown = {**PARAMS, "embed": {"table": random(41, 6)}}
        with pytest.raises(lora_jax.CheckpointError, match=r"shape \(40, 6\) there"):
            lora_jax.restore(tmp_path / "adapters", grown)

    def test_export(self, made: Any) -> None:
        wrapped = as_if_trained(made())
        exported = jax.export.export(jax.jit(adapted))(wrapped, IDS)
        again = jax.export.deserialize(exported.serialize(vjp_order=1))
        assert_agree(again.call(wrapped, IDS), adapted(wrapped, IDS))

    def test_flax_serialisation(self, made: Any) -> None:
        serialization = pytest.importorskip("flax.serialization")
        wrapped = as_if_trained(made())
        written = serialization.to_bytes(wrapped)
        assert_identical(serialization.from_bytes(made(), written), wrapped)


def _nothing(wrapped: Any) -> Any:
    return jax.tree.map(lambda _: None, wrapped)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [("d", None), (None, "d")], ids=["rows", "features"])
def test_a_cut_table(kind: AxisType, spec: tuple[Any, ...]) -> None:
    mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,))
    cut = NamedSharding(mesh, PartitionSpec(*spec))
    params = {"table": jax.device_put(PARAMS["embed"]["table"], cut)}
    wrapped = as_if_trained(lora_jax.wrap(params, "table", rows=ROWS))
    shardings = lora_jax.sharding.of(wrapped)["table"]
    assert shardings.lora_A.rows.spec == shardings.scale.spec == PartitionSpec()
    assert shardings.lora_B.spec == PartitionSpec(None, spec[1])
    assert wrapped["table"].lora_B.sharding.spec == PartitionSpec(None, spec[1])
    assert lora_jax.merge(wrapped)["table"].sharding == cut
    along_vocabulary, along_features = (PartitionSpec(None, None, axis) for axis in spec)

    def tied(params: Any, ids: jax.Array) -> jax.Array:
        table = params["table"]
        if kind == AxisType.Auto:
            table = jax.lax.with_sharding_constraint(table, cut)
            return jnp.tanh(table[ids]) @ table.T
        hidden = jnp.tanh(table.at[ids].get(out_sharding=NamedSharding(mesh, along_features)))
        out = NamedSharding(mesh, along_vocabulary)
        return jnp.einsum("btd,vd->btv", hidden, table, out_sharding=out)

    with jax.set_mesh(mesh):
        actual = jax.jit(lora_jax.adapt(tied, on_materialize="error"))(wrapped, IDS)
        expected = jax.jit(tied)(lora_jax.merge(wrapped), IDS)
    assert_agree(actual, expected)


OTHER_PARTS: dict[str, Any] = {
    "a bank": lambda tree, _: lora_jax.serving.bank([tree]),
    "a blend": lambda tree, _: lora_jax.arithmetic.blend([tree, tree], [1.0, 2.0]),
    "another rank": lambda tree, _: lora_jax.arithmetic.resize(tree, {"embed": 2}),
    "a file of GGUF": lambda tree, folder: gguf.save(
        folder / "adapter.gguf",
        tree,
        names=[
            peft.Rule("token_embd.weight", "embed/table", kind="embedding"),
            peft.Rule("blk.0.attn_q.weight", "query/kernel"),
        ],
        architecture="llama",
    ),
}


@pytest.mark.parametrize("part", OTHER_PARTS)
def test_what_has_no_rows_says_so(part: str, tmp_path: Path) -> None:
    wrapped = wrapped_params({"embed": {"rows": ROWS}, "query": {}})
    with pytest.raises(ValueError, match=r"single rows( of)?.*'embed/table'|'embed/table'.*single"):
        OTHER_PARTS[part](wrapped, tmp_path)


def test_one_rank_for_all_means_the_others() -> None:
    wrapped = as_if_trained(wrapped_params({"embed": {"rows": ROWS}, "query": {}}))
    resized = lora_jax.arithmetic.resize(wrapped, 3)
    assert resized["query"]["kernel"].rank == 3
    assert_identical(resized["embed"], wrapped["embed"])


def test_a_bank_stands_on_rows() -> None:
    rows = as_if_trained(wrapped_params())
    outer = as_if_trained(wrapped_params("embed"), seed=3)
    node = dataclasses.replace(outer["embed"]["table"], base=rows["embed"]["table"])
    bank = lora_jax.serving.bank([{**PARAMS, "embed": {"table": node}}])
    served = lora_jax.serving.adapt(model, on_materialize="error")(bank, [0, -1], IDS)
    for place, tree in enumerate(({**PARAMS, "embed": {"table": node}}, rows)):
        assert_agree(served[place], model(lora_jax.merge(tree), IDS[place]))
