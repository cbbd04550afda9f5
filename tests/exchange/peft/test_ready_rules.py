"""Rules that are ready: the names of every leaf, and whole checkpoints and adapters through them.

The trees are written here as the libraries make them: with this `transformers` there are no Flax
classes, and Tunix has an environment of its own, where `test_tunix.py` runs.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

import lora_jax
from experiments.models.bert import BertConfig
from experiments.models.bert.model import BertClassifier, BertEncoder
from lora_jax._paths import leaves_with_paths
from lora_jax.exchange import place
from lora_jax.exchange.peft import load, preview, ready_rules, save
from lora_jax.exchange.peft._architectures import TREES
from tests.exchange.peft.models import random_tree
from tests.trained import as_if_trained

VOCABULARY, WIDTH, HIDDEN, HEADS, KEY_HEADS, HEAD_WIDTH, LAYERS, EXPERTS = 19, 8, 12, 4, 2, 4, 2, 3
HEAD = "lm_head.weight"


# --- the trees, by library -----------------------------------------------------------------------


def stacked_decoder(model_type, *, tied):
    """Returns the tree of `experiments.models` for a decoder."""
    heads = {"query": HEADS, "key": KEY_HEADS, "value": KEY_HEADS}
    shapes = {
        "attention_norm/scale": (WIDTH,),
        **{f"attention/{name}/kernel": (WIDTH, n, HEAD_WIDTH) for name, n in heads.items()},
        "attention/out/kernel": (HEADS, HEAD_WIDTH, WIDTH),
        "mlp_norm/scale": (WIDTH,),
        "mlp/gate/kernel": (WIDTH, HIDDEN),
        "mlp/up/kernel": (WIDTH, HIDDEN),
        "mlp/down/kernel": (HIDDEN, WIDTH),
    }
    if model_type == "qwen2":
        shapes |= {f"attention/{name}/bias": (n, HEAD_WIDTH) for name, n in heads.items()}
    if model_type == "qwen3":
        shapes |= {f"attention/{name}_norm/scale": (HEAD_WIDTH,) for name in ("query", "key")}
    return {
        "embed/embedding": (VOCABULARY, WIDTH),
        **{f"layers/{path}": (LAYERS, *shape) for path, shape in shapes.items()},
        "norm/scale": (WIDTH,),
        **({} if tied else {"head/kernel": (WIDTH, VOCABULARY)}),
    }


def layered(shapes, template):
    return {
        f"{template.format(layer)}/{path}": shape
        for layer in range(LAYERS)
        for path, shape in shapes.items()
    }


def tunix_decoder(model_type, *, tied):
    heads = {"q": HEADS, "k": KEY_HEADS, "v": KEY_HEADS}
    sides = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    shapes = {
        "input_layernorm/w": (WIDTH,),
        **{f"attn/{name}_proj/w": (WIDTH, n, HEAD_WIDTH) for name, n in heads.items()},
        "attn/o_proj/w": (HEADS, HEAD_WIDTH, WIDTH),
        "post_attention_layernorm/w": (WIDTH,),
    }
    if model_type == "qwen3_moe":
        shapes |= {f"mlp/{name}_proj": (EXPERTS, *shape) for name, shape in sides.items()}
        shapes["mlp/router/kernel"] = (WIDTH, EXPERTS)
    else:
        shapes |= {f"mlp/{name}_proj/kernel": shape for name, shape in sides.items()}
    if model_type == "qwen2":
        shapes |= {f"attn/{name}_bias": (n * HEAD_WIDTH,) for name, n in heads.items()}
    if model_type in {"qwen3", "qwen3_moe"}:
        shapes |= {f"attn/{name}_norm/w": (HEAD_WIDTH,) for name in ("q", "k")}
    return {
        "embedder/input_embedding": (VOCABULARY, WIDTH),
        **layered(shapes, "layers/{}"),
        "final_norm/w": (WIDTH,),
        **({} if tied else {"lm_head/w": (WIDTH, VOCABULARY)}),
    }


def tunix_gemma(model_type, *, tied, key_heads=KEY_HEADS):
    assert tied
    shapes = {
        "pre_attention_norm/scale": (WIDTH,),
        "attn/attn_vec_einsum/w": (HEADS, HEAD_WIDTH, WIDTH),
        "pre_ffw_norm/scale": (WIDTH,),
        "mlp/gate_proj/kernel": (WIDTH, HIDDEN),
        "mlp/up_proj/kernel": (WIDTH, HIDDEN),
        "mlp/down_proj/kernel": (HIDDEN, WIDTH),
    }
    if key_heads == HEADS:
        shapes["attn/qkv_einsum/w"] = (3, HEADS, WIDTH, HEAD_WIDTH)
    else:
        shapes["attn/q_einsum/w"] = (HEADS, WIDTH, HEAD_WIDTH)
        shapes["attn/kv_einsum/w"] = (2, key_heads, WIDTH, HEAD_WIDTH)
    if model_type != "gemma":
        shapes["post_ffw_norm/scale"] = (WIDTH,)
    if model_type == "gemma2":
        shapes["post_attn_norm/scale"] = (WIDTH,)
    if model_type == "gemma3_text":
        shapes["post_attention_norm/scale"] = (WIDTH,)
        shapes |= {f"attn/_{name}_norm/scale": (HEAD_WIDTH,) for name in ("query", "key")}
    return {
        "embedder/input_embedding": (VOCABULARY, WIDTH),
        **layered(shapes, "layers/{}"),
        "final_norm/scale": (WIDTH,),
    }


def flax_decoder(model_type, *, tied):
    flat, narrow = HEADS * HEAD_WIDTH, KEY_HEADS * HEAD_WIDTH
    shapes = {
        "input_layernorm/weight": (WIDTH,),
        "self_attn/q_proj/kernel": (WIDTH, flat),
        "self_attn/k_proj/kernel": (WIDTH, narrow),
        "self_attn/v_proj/kernel": (WIDTH, narrow),
        "self_attn/o_proj/kernel": (flat, WIDTH),
        "post_attention_layernorm/weight": (WIDTH,),
        "mlp/gate_proj/kernel": (WIDTH, HIDDEN),
        "mlp/up_proj/kernel": (WIDTH, HIDDEN),
        "mlp/down_proj/kernel": (HIDDEN, WIDTH),
    }
    return {
        "model/embed_tokens/embedding": (VOCABULARY, WIDTH),
        **layered(shapes, "model/layers/{}"),
        "model/norm/weight": (WIDTH,),
        **({} if tied else {"lm_head/kernel": (WIDTH, VOCABULARY)}),
    }


def dense(path, inputs, outputs):
    return {f"{path}/kernel": (inputs, outputs), f"{path}/bias": (outputs,)}


def norm(path):
    return {f"{path}/scale": (WIDTH,), f"{path}/bias": (WIDTH,)}


def flax_bert(model_type, *, tied):
    """Returns the tree of `FlaxBertForMaskedLM`."""
    shapes = {
        **dense("attention/self/query", WIDTH, WIDTH),
        **dense("attention/self/key", WIDTH, WIDTH),
        **dense("attention/self/value", WIDTH, WIDTH),
        **dense("attention/output/dense", WIDTH, WIDTH),
        **norm("attention/output/LayerNorm"),
        **dense("intermediate/dense", WIDTH, HIDDEN),
        **dense("output/dense", HIDDEN, WIDTH),
        **norm("output/LayerNorm"),
    }
    return {
        "bert/embeddings/word_embeddings/embedding": (VOCABULARY, WIDTH),
        "bert/embeddings/position_embeddings/embedding": (7, WIDTH),
        "bert/embeddings/token_type_embeddings/embedding": (2, WIDTH),
        **norm("bert/embeddings/LayerNorm"),
        **layered(shapes, "bert/encoder/layer/{}"),
        **dense("cls/predictions/transform/dense", WIDTH, WIDTH),
        **norm("cls/predictions/transform/LayerNorm"),
        "cls/predictions/bias": (VOCABULARY,),
        **({} if tied else {"cls/predictions/decoder/kernel": (WIDTH, VOCABULARY)}),
    }


def flax_t5(model_type, *, tied):
    flat = HEADS * HEAD_WIDTH
    tree = {"shared/embedding": (VOCABULARY, WIDTH)}
    for stack, attentions in (("encoder", ["Self"]), ("decoder", ["Self", "EncDec"])):
        shapes = {}
        for number, attention in enumerate(attentions):
            path = f"layer/{number}/{attention}Attention"
            shapes |= {f"{path}/{name}/kernel": (WIDTH, flat) for name in "qkv"}
            shapes[f"{path}/o/kernel"] = (flat, WIDTH)
        last = f"layer/{len(attentions)}/DenseReluDense"
        shapes |= {f"{last}/wi/kernel": (WIDTH, HIDDEN), f"{last}/wo/kernel": (HIDDEN, WIDTH)}
        norms = range(len(attentions) + 1)
        shapes |= {f"layer/{number}/layer_norm/weight": (WIDTH,) for number in norms}
        tree |= layered(shapes, stack + "/block/{}")
        first = f"{stack}/block/0/layer/0/SelfAttention/relative_attention_bias/embedding"
        tree |= {first: (32, HEADS), f"{stack}/final_layer_norm/weight": (WIDTH,)}
    return tree | ({} if tied else {"lm_head/kernel": (WIDTH, VOCABULARY)})


def own_t5(model_type, *, tied, gated=False):
    """Returns the tree of `experiments.models` for an encoder-decoder."""
    attention = {
        **{f"{name}/kernel": (WIDTH, HEADS, HEAD_WIDTH) for name in ("query", "key", "value")},
        "out/kernel": (HEADS, HEAD_WIDTH, WIDTH),
    }
    first = ("gate", "up") if gated else ("hidden",)
    mlp = {**{f"{name}/kernel": (WIDTH, HIDDEN) for name in first}, "down/kernel": (HIDDEN, WIDTH)}
    sublayers = {"attention": attention, "cross_attention": attention, "mlp": mlp}
    tree = {"embed/embedding": (VOCABULARY, WIDTH)}
    for stack, names in (("encoder", ("attention", "mlp")), ("decoder", tuple(sublayers))):
        for name in names:
            tree[f"{stack}/layers/{name}_norm/scale"] = (LAYERS, WIDTH)
            tree |= {
                f"{stack}/layers/{name}/{path}": (LAYERS, *shape)
                for path, shape in sublayers[name].items()
            }
        tree[f"{stack}/relative_bias/embedding"] = (32, HEADS)
        tree[f"{stack}/norm/scale"] = (WIDTH,)
    return tree | ({} if tied else {"head/kernel": (WIDTH, VOCABULARY)})


BERT = BertConfig(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    intermediate_size=HIDDEN,
    max_position_embeddings=7,
)


def own_bert(model_type, *, tied, module=None):
    assert not tied
    tokens, mask = jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 3), bool)
    module = BertEncoder(BERT) if module is None else module
    params = jax.eval_shape(module.init, jax.random.key(0), tokens, mask)["params"]
    return {path: leaf.shape for path, leaf in leaves_with_paths(params)}


def make_tree(model_type, tree, *, tied):
    """Returns a tree of random arrays, nested as the library nests them."""
    own = {"bert": own_bert, "t5": own_t5}.get(model_type, stacked_decoder)
    flax = {"bert": flax_bert, "t5": flax_t5}.get(model_type, flax_decoder)
    tunix = tunix_gemma if model_type.startswith("gemma") else tunix_decoder
    makers = {"lora_jax": own, "flax": flax, "tunix": tunix}
    return nested(makers[tree](model_type, tied=tied))


def nested(shapes):
    return random_tree(unflatten_dict({tuple(path.split("/")): at for path, at in shapes.items()}))


CASES = [
    (model_type, tree, tied) for (model_type, tree), found in TREES.items() for tied in found.ties
]


# --- the checkpoints of transformers -------------------------------------------------------------

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


# --- the tests -----------------------------------------------------------------------------------


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
