"""Rules that are ready: the names of every leaf, and whole checkpoints and adapters by them."""

import functools
import itertools

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax
from experiments.models.bert.model import BertClassifier
from lora_jax.exchange import place
from lora_jax.exchange.peft import load, preview, ready_rules, save
from lora_jax.exchange.peft._architectures import TREES
from tests.exchange.peft.library_trees import (
    BERT,
    EXPERTS,
    HEAD_WIDTH,
    HEADS,
    HIDDEN,
    KEY_HEADS,
    LAYERS,
    VOCABULARY,
    WIDTH,
    make_tree,
    nested,
    own_bert,
    own_t5,
    tunix_gemma,
)
from tests.trained import as_if_trained

HEAD = "lm_head.weight"

CASES = [
    (model_type, tree, tied) for (model_type, tree), found in TREES.items() for tied in found.ties
]


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "head_dim": HEAD_WIDTH,
    "pad_token_id": 0,
    "max_position_embeddings": 7,
}
T5_SIZES = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": HEAD_WIDTH,
    "d_ff": HIDDEN,
    "num_layers": LAYERS,
    "num_heads": HEADS,
}
OTHER_SIZES = {
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": HIDDEN},
    "t5": T5_SIZES,
}
CAUSAL = "AutoModelForCausalLM"
# BERT's encoder by itself is what this project has.
CLASSES = {
    ("bert", "lora_jax"): "BertModel",
    ("bert", "flax"): "BertForMaskedLM",
    ("t5", "flax"): "T5ForConditionalGeneration",
    ("t5", "lora_jax"): "T5ForConditionalGeneration",
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Returns the tensors of the file that `transformers` writes for a random model."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")

    @functools.cache
    def of_class(name, model_type, tied):
        sizes = SIZES | OTHER_SIZES.get(model_type, {})
        config = transformers.AutoConfig.for_model(model_type, **sizes, tie_word_embeddings=tied)
        made_by = getattr(transformers, name)
        model = made_by.from_config(config) if name == CAUSAL else made_by(config)
        folder = tmp_path_factory.mktemp(model_type)
        model.save_pretrained(folder)
        return load_file(folder / "model.safetensors")

    return of_class


def checkpoint_of(checkpoints, model_type, tree, tied):
    name = CLASSES.get((model_type, tree), CAUSAL)
    tensors = dict(checkpoints(name, model_type, tied))
    if (model_type, tree) == ("bert", "lora_jax"):
        return {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    # Transformers 5 writes no head of its own for these two, as older versions did.
    head, table = {
        "bert": ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        "t5": (HEAD, "shared.weight"),
    }.get(model_type, (None, None))
    if head and not tied:
        tensors.setdefault(head, tensors[table])
        tensors.pop("cls.predictions.decoder.bias", None)
    return tensors


@pytest.mark.parametrize(("model_type", "tree", "tied"), CASES)
class TestEachArchitecture:
    def test_every_leaf_has_a_rule(self, model_type, tree, tied):
        params = make_tree(model_type, tree, tied=tied)
        rules = ready_rules(model_type, tree, tied=tied)
        found = preview(params, names=rules)
        assert (found.problems, found.without_rule) == ((), ())
        assert len(found.rows) == len(jax.tree.leaves(params))
        # Where several rules fit a leaf, the special one stands before the general ones.
        general = [rule for rule in rules if "{module" in rule.path]
        for path in found.axes:
            fitting = [rule for rule in rules if rule.fields_of(path) is not None]
            assert len([rule for rule in fitting if rule not in general]) <= 1
            assert len(fitting) == 1 or fitting[-1] in general

    def test_a_checkpoint_of_transformers_fills_the_tree(self, checkpoints, model_type, tree, tied):
        tensors = checkpoint_of(checkpoints, model_type, tree, tied)
        params = make_tree(model_type, tree, tied=tied)
        placed = place(tensors, params, names=ready_rules(model_type, tree, tied=tied))
        assert sum(leaf.size for leaf in jax.tree.leaves(placed)) == sum(
            tensor.size for tensor in tensors.values()
        )


@pytest.mark.parametrize(
    ("model_type", "tree", "targets"),
    [
        ("qwen2", "lora_jax", "kernel"),
        ("qwen3_moe", "tunix", ".*_proj"),
        ("gemma3_text", "tunix", ".*_(proj|einsum)"),
        ("bert", "lora_jax", "kernel"),
        ("t5", "flax", "kernel"),
        ("t5", "lora_jax", "kernel"),
    ],
)
def test_an_adapter_comes_back_bit_for_bit(tmp_path, model_type, tree, targets):
    rules = ready_rules(model_type, tree)
    params = make_tree(model_type, tree, tied=TREES[model_type, tree].ties[0])
    axes = preview(params, names=rules).axes
    wrapped = as_if_trained(lora_jax.wrap(params, targets, rank=2, axes=axes))
    save(tmp_path / "adapter", wrapped, names=rules)
    loaded = load(tmp_path / "adapter", params, names=rules)
    assert jax.tree.structure(loaded) == jax.tree.structure(wrapped)
    jax.tree.map(np.testing.assert_array_equal, loaded, wrapped)


class TestLayouts:
    def test_heads_of_a_stack(self):
        weights = np.random.default_rng(0).normal(size=(2, 8, 6)).astype(np.float32)
        name = "model.layers.{}.self_attn.q_proj.weight"
        tensors = {name.format(layer): weight for layer, weight in enumerate(weights)}
        params = nested({"layers/attention/query/kernel": (2, 6, 2, 4)})
        placed = place(tensors, params, names=ready_rules("llama", "lora_jax"))
        kernel = placed["layers"]["attention"]["query"]["kernel"]
        np.testing.assert_array_equal(kernel, weights.swapaxes(1, 2).reshape(2, 6, 2, 4))

    @pytest.mark.parametrize(
        ("leaf", "projections"), [("kv_einsum", ("k", "v")), ("qkv_einsum", ("q", "k", "v"))]
    )
    def test_projections_in_one_leaf(self, leaf, projections):
        weights = {
            one: np.random.default_rng(n).normal(size=(8, 6)) for n, one in enumerate(projections)
        }
        name = "model.layers.0.self_attn.{}_proj.weight"
        tensors = {name.format(one): weight for one, weight in weights.items()}
        params = nested({f"layers/0/attn/{leaf}/w": (len(projections), 2, 6, 4)})
        placed = place(tensors, params, names=ready_rules("gemma2", "tunix"))
        leaf = placed["layers"]["0"]["attn"][leaf]["w"]
        for value, weight in zip(leaf, weights.values(), strict=True):
            expected = weight.reshape(2, 4, 6).swapaxes(1, 2).astype(np.float32)
            np.testing.assert_array_equal(value, expected)

    def test_one_of_the_projections_in_a_leaf(self, tmp_path):
        """PEFT's own default for Gemma adapts the queries and values alone."""
        rules = ready_rules("gemma3_text", "tunix")
        params = make_tree("gemma3_text", "tunix", tied=True)
        axes = preview(params, names=rules).axes
        wrapped = as_if_trained(
            lora_jax.wrap(params, {"kv_einsum": {"layers": [1]}}, rank=2, axes=axes)
        )
        save(tmp_path / "adapter", wrapped, names=rules)
        tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert {name.split(".")[6] for name in tensors} == {"v_proj"}
        loaded = load(tmp_path / "adapter", params, names=rules)
        jax.tree.map(np.testing.assert_array_equal, loaded, wrapped)

    def test_a_leaf_with_other_projections(self):
        params = nested({"layers/0/attn/kv_einsum/w": (3, 2, 6, 4)})
        with pytest.raises(ValueError, match=r"axis 0 has 3 places; expected one for.*'k', 'v'"):
            preview(params, names=ready_rules("gemma2", "tunix"))

    def test_as_many_heads_of_keys_as_of_queries(self):
        params = nested(tunix_gemma("gemma3_text", tied=True, key_heads=HEADS))
        found = preview(params, names=ready_rules("gemma3_text", "tunix"))
        assert (found.problems, found.without_rule) == ((), ())

    def test_bert_with_a_classifier(self):
        params = nested(own_bert("bert", tied=False, module=BertClassifier(BERT, 3)))
        found = preview(params, names=ready_rules("bert", "lora_jax"))
        assert (found.problems, found.without_rule) == ((), ())
        names = {row[2]: row[0] for row in found.rows}
        assert names["classifier/kernel"] == "classifier.weight"
        query = names["encoder/layer_1/attention/query/bias"]
        assert query == "bert.encoder.layer.1.attention.self.query.bias"

    def test_a_gated_feed_forward_layer_of_t5(self):
        params = nested(own_t5("t5", tied=False, gated=True))
        found = preview(params, names=ready_rules("t5", "lora_jax", tied=False))
        assert (found.problems, found.without_rule) == ((), ())
        names = {row[2]: row[0] for row in found.rows}
        feed_forward = "{layer}.layer.2.DenseReluDense"
        for leaf, module in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo")):
            name = names[f"decoder/layers/mlp/{leaf}/kernel"]
            assert name == f"decoder.block.{feed_forward}.{module}.weight"


class TestTied:
    def test_default_is_that_of_the_architecture(self):
        for (model_type, tree), found in TREES.items():
            assert ready_rules(model_type, tree) == ready_rules(
                model_type, tree, tied=found.ties[0]
            )

    @pytest.mark.parametrize(("model_type", "tree"), sorted(set(TREES) - {("bert", "lora_jax")}))
    def test_default_is_that_of_transformers(self, model_type, tree):
        transformers = pytest.importorskip("transformers")
        config = transformers.AutoConfig.for_model(model_type)
        assert TREES[model_type, tree].ties[0] == config.tie_word_embeddings

    def test_head_of_its_own(self):
        names = [rule.name for rule in ready_rules("llama", "lora_jax")]
        assert HEAD in names
        assert not any(rule.tied for rule in ready_rules("llama", "lora_jax"))

    def test_head_that_is_the_embedding(self):
        rules = ready_rules("llama", "lora_jax", tied=True)
        assert [rule.tied for rule in rules if rule.tied] == [HEAD]
        assert HEAD not in [rule.name for rule in rules]

    def test_t5_shares_its_embedding_in_any_case(self):
        for tree, tied in itertools.product(("flax", "lora_jax"), (True, False)):
            rules = ready_rules("t5", tree, tied=tied)
            assert [rule.tied for rule in rules if rule.kind == "embedding"] == [True, False]


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "tied", "match"),
        [
            (("gpt2", "flax"), None, "`model_type` is 'gpt2'; expected one of 'bert', 'gemma', .*"),
            (("t5", "tunix"), None, "`tree` is 'tunix' for the model type 't5'; expected 'lora_j"),
            (("gemma2", "lora_jax"), None, "expected 'tunix', .* that tree has 'bert', 'llama', "),
            (("gemma2", "tunix"), False, "`tied` is False .*; expected True, .* always the embed"),
            (("llama", "flax"), True, "`tied` is True .*; expected False, .* never the embedding"),
        ],
    )
    def test_what_has_no_rules(self, arguments, tied, match):
        with pytest.raises(ValueError, match=match):
            ready_rules(*arguments, tied=tied)

    @pytest.mark.wrong_types
    def test_a_library_that_is_not_known(self):
        with pytest.raises(ValueError, match="`tree` is 'haiku' .*'lora_jax' or 'flax' or 'tunix'"):
            ready_rules("llama", "haiku")
