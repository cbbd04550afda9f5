"""What a training minimises, beside references in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from experiments.llm.objectives import Answers, Preferences
from experiments.llm.packing import Row, TrainingSteps, batch_of, learned_count, stacked
from experiments.llm.step import training_step
from experiments.llm.texts import TokenizedExample
from experiments.models.llama import Llama
from tests import tiny_llama
from tests.agreement import assert_agree
from tests.trained import as_if_trained

BETA = 0.3
MODEL = Llama(tiny_llama.config("llama"))
AXES = {"mlp": ("batch", "in", "out")}


@functools.cache
def pairs():
    """Returns three pairs: a question in common, and two answers of different lengths."""
    random = np.random.default_rng(0)
    found = []
    for lengths in ((3, 5), (4, 2), (6, 6)):
        question = random.integers(0, tiny_llama.VOCABULARY, 4, np.int32)
        for length in lengths:
            answer = random.integers(0, tiny_llama.VOCABULARY, length, np.int32)
            tokens = np.concatenate([question, answer])
            found.append(TokenizedExample(tokens, np.arange(len(tokens)) >= 4))
    return tuple(found)


def batch(*rows, length=40):
    found = [Row(row) for row in rows]
    return batch_of(pairs(), found, length=length, room=learned_count(pairs(), found) + 2)


@functools.cache
def wrapped():
    tree = lora_jax.wrap(tiny_llama.params("llama"), "mlp", rank=2, axes=AXES)
    return as_if_trained(tree)


# One width, so one program: nothing sees what is behind a text.
RUN = jax.jit(lora_jax.adapt(MODEL.apply))
WIDTH = 12


def filled(example):
    return np.pad(example.tokens, (0, WIDTH - len(example)))[None]


@functools.cache
def margins():
    base = lora_jax.unwrap(wrapped())
    gains = [log_likelihood(wrapped(), each) - log_likelihood(base, each) for each in pairs()]
    return BETA * (np.array(gains[::2]) - np.array(gains[1::2]))


def log_likelihood(params, example):
    """Returns that of an answer in float64, from the logits of the whole text."""
    logits = np.asarray(RUN({"params": params}, filled(example)), np.float64)[0]
    logits -= logits.max(axis=-1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    places = np.flatnonzero(example.learned[1:])
    return sum(logs[place, example.tokens[place + 1]] for place in places)


@pytest.mark.parametrize("rows", [((0, 1, 2, 3), (4, 5)), ((0, 1), (2, 3), (4, 5))], ids=str)
def test_the_loss_of_preferences(rows):
    objective = Preferences(BETA)
    base = lora_jax.unwrap(wrapped())
    found = objective.sums(MODEL.apply, wrapped(), base, batch(*rows))
    losses = np.log1p(np.exp(-margins()))
    assert float(found["loss"]) == pytest.approx(losses.sum(), rel=1e-4)
    assert float(found["accuracy"]) == (margins() > 0).sum()
    assert float(objective.count(batch(*rows))) == 3
    merged = objective.sums(MODEL.apply, lora_jax.merge(wrapped()), base, batch(*rows))
    assert_agree(merged, found, tolerance=1e-3)


def test_without_a_change_there_is_no_preference():
    untrained = lora_jax.wrap(tiny_llama.params("llama"), "mlp", rank=2, axes=AXES)
    base = lora_jax.unwrap(untrained)
    found = Preferences(BETA).sums(MODEL.apply, untrained, base, batch((0, 1), (2, 3)))
    assert float(found["loss"]) == pytest.approx(2 * np.log(2))
    assert float(found["accuracy"]) == 0


def test_gradients_are_those_of_the_likelihoods():
    """With the derivative of the loss written out, over the likelihoods of single texts."""
    trainable, frozen = lora_jax.split(wrapped())

    @jax.jit
    @jax.grad
    def gradient(trainable, tokens, learned):
        tree = lora_jax.combine(trainable, frozen)
        logs = jax.nn.log_softmax(lora_jax.adapt(MODEL.apply)({"params": tree}, tokens)[0])
        of_next = jnp.take_along_axis(logs[:-1], tokens[0, 1:, None], axis=1)[:, 0]
        return jnp.sum(of_next * learned)

    def loss(trainable):
        tree = lora_jax.combine(trainable, frozen)
        base, pairs = lora_jax.unwrap(tree), batch((0, 1, 2, 3), (4, 5))
        return Preferences(BETA).sums(MODEL.apply, tree, base, pairs)["loss"]

    weights = -BETA / (1 + np.exp(margins()))
    expected = jax.tree.map(jnp.zeros_like, trainable)
    for number, example in enumerate(pairs()):
        sign = 1.0 if number % 2 == 0 else -1.0
        learned = np.pad(example.learned[1:], (0, WIDTH - len(example))).astype(np.float32)
        of_one = gradient(trainable, filled(example), learned)
        scale = np.float32(sign * weights[number // 2])
        expected = jax.tree.map(lambda total, one: total + scale * one, expected, of_one)  # noqa: B023
    assert_agree(jax.jit(jax.grad(loss))(trainable), expected, tolerance=1e-3)


@pytest.mark.parametrize("objective", [Answers(), Preferences(BETA)], ids=str)
def test_pairs_count_alike_in_any_batch(objective):
    trainable, frozen = lora_jax.split(wrapped())
    tx = optax.sgd(0.1)
    step = jax.jit(training_step(MODEL.apply, tx, objective))

    def taken(*batches):
        return step(trainable, tx.init(trainable), frozen, stacked(batches))

    room = learned_count(pairs(), [Row((0, 1, 2, 3, 4, 5))])

    def of(*rows):
        return batch_of(pairs(), [Row(row) for row in rows], length=40, room=room)

    in_one, in_two = taken(of((0, 1, 2, 3), (4, 5))), taken(of((0, 1), ()), of((2, 3), (4, 5)))
    assert_agree(in_two[0], in_one[0], tolerance=1e-4)
    assert_agree(in_two[2], in_one[2], tolerance=1e-4)


def test_pairs_stay_together():
    random = np.random.default_rng(0)
    examples = [
        TokenizedExample(np.full(n, k, np.int32), np.arange(n) > 0)
        for k, n in enumerate(random.integers(2, 9, 40))
    ]
    steps = TrainingSteps(examples, rows=2, length=32, epochs=1, seed=0, together=2)
    seen = []
    for step in steps:
        for tokens, segments in zip(step.tokens[0], step.segments[0], strict=True):
            numbers = [int(tokens[segments == s][0]) for s in range(1, segments.max() + 1)]
            assert all(b == a + 1 for a, b in zip(numbers[::2], numbers[1::2], strict=True))
            assert all(number % 2 == 0 for number in numbers[::2])
            seen += numbers
    assert sorted(seen) == list(range(40))
