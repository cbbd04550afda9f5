"""The loss and the step: packed as unpacked, in chunks as whole, 4 × 2 as 1 × 8."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from benchmarks.programs import Cost
from experiments.llm import loss as loss_module
from experiments.llm.loss import losses_at_places
from experiments.llm.objectives import Answers
from experiments.llm.packing import Row, batch_of, learned_count, stacked
from experiments.llm.step import training_step
from experiments.llm.texts import TokenizedExample
from experiments.models.llama import Llama
from experiments.models.t5 import T5
from tests import tiny_llama, tiny_t5
from tests.agreement import assert_agree

MODELS = sorted(tiny_llama.CHANGES)
LENGTHS = (5, 9, 4, 12, 7, 8, 3, 11)
AXES = {"attention/(query|key|value)": ("batch", "in", "out", "out"), "mlp": ("batch", "in", "out")}


@functools.cache
def examples():
    random = np.random.default_rng(0)
    return tuple(
        TokenizedExample(
            random.integers(0, tiny_llama.VOCABULARY, n, np.int32), np.arange(n) >= n // 3
        )
        for n in LENGTHS
    )


def batch(*rows, length=16, groups=1):
    found = [Row(row) for row in rows]
    room = learned_count(examples(), found) + 3
    return batch_of(examples(), found, length=length, room=room, groups=groups)


@functools.cache
def examples_with_sources():
    random = np.random.default_rng(1)
    return tuple(
        dataclasses.replace(each, source=random.integers(0, tiny_t5.VOCABULARY, n, np.int32))
        for each, n in zip(examples(), (11, 3, 8, 6, 9, 5, 7, 4), strict=True)
    )


def losses_and_gradients(apply, params, batch):
    def summed(params, batch):
        return losses_at_places(apply, params, batch).sum()

    return jax.jit(jax.value_and_grad(summed))(params, batch)


@pytest.mark.parametrize("model_type", MODELS)
def test_packed_is_unpacked(model_type):
    """Losses and gradients: no example sees another."""
    of = functools.partial(
        losses_and_gradients,
        Llama(tiny_llama.config(model_type)).apply,
        tiny_llama.params(model_type),
    )
    packed = of(batch((0, 1), (3, 2), (4, 5), (7, 6)))
    single = of(batch(*((n,) for n in range(8))))
    assert_agree(packed, single, tolerance=1e-4)


@pytest.mark.parametrize("version", sorted(tiny_t5.CHANGES))
def test_packed_is_unpacked_with_sources(version):
    """No example sees another's source either."""
    of = functools.partial(
        losses_and_gradients, T5(tiny_t5.config(version)).apply, tiny_t5.params(version)
    )

    def batch_with(*rows):
        found = [Row(row) for row in rows]
        known = examples_with_sources()
        room = learned_count(known, found)
        return batch_of(known, found, length=16, room=room, source_length=16)

    packed = of(batch_with((0, 1), (3, 2), (4, 5), (7, 6)))
    single = of(batch_with(*((n,) for n in range(8))))
    assert_agree(packed, single, tolerance=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_loss_is_that_of_all_logits(monkeypatch, groups):
    monkeypatch.setattr(loss_module, "CHUNK", 7)
    params, apply = tiny_llama.params("qwen2"), Llama(tiny_llama.config("qwen2")).apply
    rows = batch((0, 1), (3, 2), groups=groups)
    total = jax.jit(lambda params: losses_at_places(apply, params, rows).sum())(params)
    logits = jax.jit(apply)({"params": params}, rows.tokens, rows.positions, rows.segments)
    logits = np.asarray(logits, np.float64).reshape(groups, -1, tiny_llama.VOCABULARY)
    expected = 0.0
    for group, place in np.argwhere(rows.weights):
        row = logits[group, rows.places[group, place]]
        row = row - row.max()
        expected += np.log(np.exp(row).sum()) - row[rows.targets[group, place]]
    assert float(total) == pytest.approx(expected, rel=1e-5)


def cost_with_many_words(words, length):
    """Returns what the gradient of one text's loss costs, of which the head is most."""
    model = Llama(tiny_llama.config("llama", vocab_size=words))
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    whole = TokenizedExample(np.zeros(length, np.int32), np.arange(length) > 0)
    rows = batch_of([whole], [Row((0,))], length=length, room=length)

    def gradient(params):
        # The embedding is frozen, as beside adapters; its own gradient is as large as it is.
        def loss(norm):
            return losses_at_places(model.apply, {**params, "norm": norm}, rows).sum()

        return jax.value_and_grad(loss)(params["norm"])

    return Cost.of(jax.jit(gradient).lower(params).compile())


@pytest.mark.usefixtures("optimised")
def test_no_array_has_the_logits_of_all_tokens(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK", 16)
    # The embedding in another order, which XLA may keep twice, is a quarter of them.
    assert cost_with_many_words(20_000, 512).temporary_bytes < 512 * 20_000 * 4 / 2


@pytest.mark.usefixtures("optimised")
def test_the_logits_of_one_chunk_are_computed_once():
    """A product for the logits, and one for the gradient of hidden states; layers are little."""
    product = 2 * 64 * tiny_llama.WIDTH * 20_000
    assert cost_with_many_words(20_000, 64).flops < 2.5 * product


def test_chunks_are_of_one_size(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK", 10)
    params, rows = tiny_llama.params("qwen2"), batch((0,), (3,))
    apply = Llama(tiny_llama.config("qwen2")).apply
    assert rows.places.size == 15
    text = str(jax.make_jaxpr(lambda params: losses_at_places(apply, params, rows))(params))
    assert f"f32[1,8,{tiny_llama.VOCABULARY}]" in text
    assert f"f32[1,10,{tiny_llama.VOCABULARY}]" not in text


def trained_parts(**options):
    params = tiny_llama.params("llama")
    wrapped = lora_jax.wrap(params, "attention/(query|value)|mlp/", rank=2, axes=AXES, **options)
    return lora_jax.split(wrapped)


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"train": "norm"}], ids=str)
def test_accumulated_batches_are_one_batch(options):
    """Each token counts alike, though the batches learn different numbers of them."""
    model = Llama(tiny_llama.config("llama"))
    trainable, frozen = trained_parts(**options)
    # Plain steps: what Adam divides by grows from differences of rounding.
    tx = optax.sgd(0.1)
    step = jax.jit(training_step(model.apply, tx, Answers()))
    pairs = [(0, 1), (2, 3), (4, 5), (6, 7)]
    room = learned_count(examples(), [Row((n,)) for n in range(8)])

    def of(numbers):
        return batch_of(examples(), [Row((n,)) for n in numbers], length=16, room=room)

    in_four = step(trainable, tx.init(trainable), frozen, stacked([of(pair) for pair in pairs]))
    in_one = step(trainable, tx.init(trainable), frozen, stacked([of(range(8))]))
    assert_agree(in_four[0], in_one[0], tolerance=1e-5)
    assert_agree(in_four[2], in_one[2], tolerance=1e-5)
    assert float(in_four[2]["parts"]) == sum(n - max(n // 3, 1) for n in LENGTHS)


def test_steps_lower_the_loss():
    model = Llama(tiny_llama.config("llama"))
    trainable, frozen = trained_parts()
    tx = optax.adam(3e-2)
    step = jax.jit(training_step(model.apply, tx, Answers()))
    state, rows = tx.init(trainable), stacked([batch((0, 1), (3, 2)), batch((0, 1), (3, 2))])
    losses = []
    for _ in range(15):
        trainable, state, result = step(trainable, state, frozen, rows)
        losses.append(float(result["loss"]))
    assert losses[-1] < 0.7 * losses[0]
