"""The trees of parameters that libraries make for an architecture, of random arrays.

They are written here as the libraries make them: with this `transformers` there are no Flax
classes, and Tunix has an environment of its own, where `test_tunix.py` runs.
"""

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from experiments.models.bert import BertConfig
from experiments.models.bert.model import BertEncoder
from lora_jax._paths import leaves_with_paths
from tests.exchange.peft.models import random_tree

VOCABULARY, WIDTH, HIDDEN, HEADS, KEY_HEADS, HEAD_WIDTH, LAYERS, EXPERTS = 19, 8, 12, 4, 2, 4, 2, 3


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
