"""What a model computes with adapters of single rows, and what is compiled for it."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from benchmarks.programs import Cost
from tests.agreement import assert_agree, assert_identical
from tests.arrays import random
from tests.rows import IDS, PARAMS, ROWS, adapted, beside_low_rank, loss, model, wrapped_params
from tests.test_nothing_again import jax_does_nothing_but_run
from tests.trained import as_if_trained


@pytest.mark.parametrize("made", [wrapped_params, beside_low_rank])
class TestComputed:
    def test_outputs_and_gradients(self, made: Any) -> None:
        wrapped = as_if_trained(made())
        assert_agree(jax.jit(adapted)(wrapped, IDS), model(lora_jax.merge(wrapped), IDS))
        halves = lora_jax.split(wrapped)

        def dense(wrapped: Any, ids: jax.Array) -> jax.Array:
            return model(lora_jax.merge(wrapped), ids)

        expected = jax.grad(loss(dense))(*halves)
        assert_agree(jax.jit(jax.grad(loss(adapted)))(*halves), expected)
        assert_agree(jax.grad(loss(jax.checkpoint(adapted)))(*halves), expected)

    def test_is_the_base_at_the_start(self, made: Any) -> None:
        np.testing.assert_array_equal(jax.jit(adapted)(made(), IDS), jax.jit(model)(PARAMS, IDS))

    def test_of_a_quantised_table(self, made: Any) -> None:
        del made
        params = lora_jax.quantize(PARAMS, "embed", format="int8", block=5)
        wrapped = as_if_trained(lora_jax.wrap(params, {"embed": {"rows": ROWS}}))
        merged = lora_jax.merge(wrapped)
        assert_agree(adapted(wrapped, IDS), model(merged, IDS))
        plain = lora_jax.quantization.dequantize(params)["embed"]["table"]
        others = np.delete(np.arange(40), ROWS)
        np.testing.assert_array_equal(merged["embed"]["table"][others], plain[others])
        assert_identical(lora_jax.unwrap(wrapped), params)
        with pytest.warns(lora_jax.RequantizationWarning):
            again = lora_jax.merge(wrapped, requantize=True)["embed"]["table"]
        assert again.format == "int8"


def test_half_precision_rounds_once() -> None:
    params = {"table": PARAMS["embed"]["table"].astype(jnp.bfloat16)}
    wrapped = as_if_trained(lora_jax.wrap(params, "table", rows=ROWS))
    expected = np.asarray(params["table"], np.float32)
    expected[ROWS] += wrapped["table"].lora_B
    rounded = jnp.asarray(expected).astype(jnp.bfloat16)
    assert_identical(lora_jax.merge(wrapped)["table"], rounded)
    looked_up = lora_jax.adapt(lambda params, ids: params["table"][ids])(wrapped, IDS)
    assert_identical(looked_up, rounded[IDS])


def test_merge_unmerge_and_unwrap() -> None:
    wrapped = as_if_trained(wrapped_params())
    table, weight = PARAMS["embed"]["table"], wrapped["embed"]["table"]
    merged = lora_jax.merge(wrapped)
    expected = table.at[jnp.array(ROWS)].add(weight.lora_B)
    assert_identical(merged["embed"]["table"], expected)
    back = lora_jax.unmerge(merged, wrapped)
    assert_agree(back["embed"]["table"].base, table)
    assert_identical(
        dataclasses.replace(back["embed"]["table"], base=None),
        dataclasses.replace(weight, base=None),
    )
    assert lora_jax.unwrap(wrapped)["embed"]["table"] is table


def test_other_rows_compile_nothing_again() -> None:
    wrapped = as_if_trained(wrapped_params())
    step = jax.jit(jax.value_and_grad(loss(adapted)))
    step(*lora_jax.split(wrapped))
    weight = wrapped["embed"]["table"]
    rows = jnp.array([0, 39, 3], jnp.int32)
    selection = dataclasses.replace(weight.lora_A, rows=rows)
    other = {**wrapped, "embed": {"table": dataclasses.replace(weight, lora_A=selection)}}
    expected = loss(lambda wrapped, ids: model(lora_jax.merge(wrapped), ids))
    expected_value = expected(*lora_jax.split(other))
    with jax_does_nothing_but_run():
        value, _ = step(*lora_jax.split(other))
    assert_agree(value, expected_value)


def test_many_sets_of_rows_are_vmapped() -> None:
    wrapped = as_if_trained(wrapped_params())
    weight = wrapped["embed"]["table"]
    sets = jnp.array([[0, 39, 3], ROWS], jnp.int32)

    def of_rows(rows: jax.Array) -> Any:
        selection = dataclasses.replace(weight.lora_A, rows=rows)
        return {**wrapped, "embed": {"table": dataclasses.replace(weight, lora_A=selection)}}

    actual = jax.vmap(lambda rows: adapted(of_rows(rows), IDS))(sets)
    assert_agree(actual, np.stack([model(lora_jax.merge(of_rows(rows)), IDS) for rows in sets]))


def test_a_table_within_a_loop() -> None:
    wrapped = as_if_trained(wrapped_params())

    def generated(params: Any, first: jax.Array) -> jax.Array:
        def step(token: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            logits = model(params, token)
            return jnp.argmax(logits, axis=-1), logits

        return jax.lax.scan(step, first, length=4)[1]

    actual = jax.jit(lora_jax.adapt(generated, on_materialize="error"))(wrapped, IDS[0])
    assert_agree(actual, generated(lora_jax.merge(wrapped), IDS[0]))


def test_a_loss_over_parts_of_the_vocabulary() -> None:
    wrapped = as_if_trained(wrapped_params())

    def logits(params: Any, ids: jax.Array) -> jax.Array:
        table = params["embed"]["table"]
        hidden = jnp.tanh(table[ids])

        def part(_: None, start: jax.Array) -> tuple[None, jax.Array]:
            return None, hidden @ jax.lax.dynamic_slice_in_dim(table, start, 12).T

        parts = jax.lax.scan(part, None, jnp.array([0, 12, 24, 36]))[1]
        return jnp.concatenate([*parts, hidden @ table[10:35].T, hidden @ table[::-2].T], axis=-1)

    parted = lora_jax.adapt(logits, on_materialize="error")
    halves = lora_jax.split(wrapped)
    expected = jax.value_and_grad(loss(lambda tree, ids: logits(lora_jax.merge(tree), ids)))
    assert_agree(jax.jit(jax.value_and_grad(loss(parted)))(*halves), expected(*halves))
    uses = [use for each in lora_jax.explain(logits, wrapped, IDS).targets for use in each.uses]
    assert [use.how for use in uses] == ["factored"] * 3 + ["dense"]


@pytest.mark.usefixtures("promoted_ranks")
@pytest.mark.parametrize("row", [30, 4], ids=["adapted", "another"])
@pytest.mark.parametrize("op", [jnp.add, jnp.subtract, jnp.multiply, jnp.divide])
def test_one_row_beside_an_array(op: Any, row: int) -> None:
    wrapped, array = as_if_trained(wrapped_params()), 2 + random(5, 6, seed=2) ** 2

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return x @ op(params["embed"]["table"][row : row + 1], array)

    actual = lora_jax.adapt(fn, on_materialize="ignore")(wrapped, random(3, 5))
    assert_agree(actual, fn(lora_jax.merge(wrapped), random(3, 5)))


def test_dropout_drops_whole_lookups() -> None:
    wrapped = as_if_trained(wrapped_params())
    table, change = PARAMS["embed"]["table"], wrapped["embed"]["table"].lora_B
    ids = jnp.full(64, ROWS[0])
    looked_up = lora_jax.adapt(lambda params, ids: params["embed"]["table"][ids], dropout=0.5)
    given = looked_up(wrapped, ids, lora_key=jax.random.key(3)) - table[ids]
    kept = np.abs(given[:, 0]) > 1e-3
    assert 0.2 < kept.mean() < 0.8
    assert_agree(given, np.where(kept[:, None], 2 * change[0], 0))


VOCABULARY, WIDTH, COUNT, TOKENS = 5003, 32, 37, 61


def step_of(forward: Any) -> Any:
    """Returns the lowered forward pass and training step of a model of these sizes."""
    params = {
        "embed": {"table": jax.ShapeDtypeStruct((VOCABULARY, WIDTH), jnp.float32)},
        "query": {"kernel": jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)},
    }
    wrapped = lora_jax.wrap(params, "embed", rows=range(COUNT))
    ids = jax.ShapeDtypeStruct((TOKENS,), jnp.int32)

    def cross_entropy(adapters: Any, frozen: Any, ids: jax.Array) -> jax.Array:
        logits = forward(lora_jax.combine(adapters, frozen), ids)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(TOKENS), ids])

    halves = lora_jax.split(wrapped)
    return {
        "forward": jax.jit(forward).lower(wrapped, ids),
        "step": jax.jit(jax.value_and_grad(cross_entropy)).lower(*halves, ids),
    }


def by_hand(wrapped: Any, ids: jax.Array) -> jax.Array:
    """Returns what `model` does, with the rows written into it."""
    weight = wrapped["embed"]["table"]
    table, rows, scale = jax.lax.stop_gradient((weight.base, weight.lora_A.rows, weight.scale))
    change = weight.lora_B * scale
    places = jnp.full(VOCABULARY, COUNT, jnp.int32)
    places = places.at[rows].set(jnp.arange(COUNT, dtype=jnp.int32))
    hidden = table[ids] + change.at[places[ids]].get(mode="fill", fill_value=0)
    hidden = jnp.tanh(hidden @ wrapped["query"]["kernel"])
    return (hidden @ table.T).at[..., rows].add(hidden @ change.T)


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("program", ["forward", "step"])
class TestCompiled:
    def test_costs_what_one_written_by_hand_does(self, program: str) -> None:
        cost, reference = (Cost.of(step_of(each)[program].compile()) for each in (adapted, by_hand))
        assert cost.flops <= 1.00 * reference.flops
        assert cost.bytes <= 1.02 * reference.bytes
        assert cost.temporary_bytes <= 1.05 * reference.temporary_bytes

    def test_has_no_matrix_of_vocabulary_and_rows(self, program: str) -> None:
        lowered = step_of(adapted)[program]
        for text in (lowered.as_text(), lowered.compile().as_text()):
            sizes = [
                tuple(map(int, re.findall(r"\d+", shape)))
                for shape in re.findall(r"\[([\d,]+)\]|tensor<([\dx]+)x", text)
                for shape in shape
                if shape
            ]
            assert (VOCABULARY, WIDTH) in sizes
            found = {each for each in sizes if VOCABULARY in each and COUNT in each}
            assert not found

    def test_has_no_second_table(self, program: str) -> None:
        """Beside the logits and their cotangent, nothing is of the size of the table."""
        cost = Cost.of(step_of(adapted)[program].compile())
        logits = 4 * TOKENS * VOCABULARY
        assert cost.temporary_bytes < {"forward": 0.5, "step": 3.5}[program] * logits
