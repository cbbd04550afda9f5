"""A small language model like Llama: by its PyTorch names, in a flat tree and in a scanned one."""

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.exchange.peft import Rule

LAYERS, VOCABULARY, WIDTH, HEADS, HEAD_DIM, HIDDEN = 2, 64, 256, 4, 64, 256

_HEADS_OUT, _HEADS_IN = ("in", "out", "out"), ("in", "in", "out")

# The modules of a layer: name in PyTorch, name in a GGUF file, path, axes.
_MODULES = (
    ("self_attn.q_proj", "attn_q", "attention/query", _HEADS_OUT),
    ("self_attn.k_proj", "attn_k", "attention/key", _HEADS_OUT),
    ("self_attn.v_proj", "attn_v", "attention/value", _HEADS_OUT),
    ("self_attn.o_proj", "attn_output", "attention/out", _HEADS_IN),
    ("mlp.gate_proj", "ffn_gate", "mlp/gate", ("in", "out")),
    ("mlp.up_proj", "ffn_up", "mlp/up", ("in", "out")),
    ("mlp.down_proj", "ffn_down", "mlp/down", ("in", "out")),
    ("input_layernorm", "attn_norm", "attention_norm", ("out",)),
    ("post_attention_layernorm", "ffn_norm", "mlp_norm", ("out",)),
)
_SHAPES = {
    "attention/query": (WIDTH, HEADS, HEAD_DIM),
    "attention/key": (WIDTH, HEADS, HEAD_DIM),
    "attention/value": (WIDTH, HEADS, HEAD_DIM),
    "attention/out": (HEADS, HEAD_DIM, WIDTH),
    "mlp/gate": (WIDTH, HIDDEN),
    "mlp/up": (WIDTH, HIDDEN),
    "mlp/down": (HIDDEN, WIDTH),
    "attention_norm": (WIDTH,),
    "mlp_norm": (WIDTH,),
}


def rules(*, gguf, scanned):
    """Returns the rules for one of the two kinds of files and one of the two trees."""
    stack = ("batch",) if scanned else ()
    layers = [
        Rule(
            f"blk.{{n}}.{short}.weight" if gguf else f"model.layers.{{n}}.{name}.weight",
            f"layers/{path}" if scanned else f"layer_{{n}}/{path}",
            axes=(*stack, *axes),
        )
        for name, short, path, axes in _MODULES
    ]
    top = ("token_embd", "output_norm") if gguf else ("model.embed_tokens", "model.norm")
    return [
        *layers,
        Rule(f"{top[0]}.weight", "embedding", kind="embedding", tied=not gguf and "lm_head.weight"),
        Rule(f"{top[1]}.weight", "norm"),
    ]


def abstract_params(*, scanned, dtype=jnp.float32):
    """Returns the tree of shapes."""
    layer = _nested({path: shape for *_, path, _ in _MODULES for shape in [_SHAPES[path]]})
    own = {"embedding": (VOCABULARY, WIDTH), "norm": (WIDTH,)}
    if scanned:
        own["layers"] = jax.tree.map(lambda s: (LAYERS, *s), layer, is_leaf=_is_shape)
    else:
        own |= {f"layer_{n}": layer for n in range(LAYERS)}
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, dtype), own, is_leaf=_is_shape)


def torch_weights():
    """Returns random weights in float32, by their names in PyTorch and as PyTorch has them."""
    rng = np.random.default_rng(0)
    weights = {"model.embed_tokens.weight": _random(rng, (VOCABULARY, WIDTH))}
    for n in range(LAYERS):
        for name, _, path, axes in _MODULES:
            sides = [
                int(np.prod([s for s, role in zip(_SHAPES[path], axes, strict=True) if role == r]))
                for r in ("out", "in")
            ]
            is_norm = axes == ("out",)
            shape = sides[:1] if is_norm else sides
            weights[f"model.layers.{n}.{name}.weight"] = _random(rng, shape) + is_norm
    weights["model.norm.weight"] = _random(rng, (WIDTH,)) + np.float32(1)
    return weights


def gguf_name(name):
    """Returns the name in a GGUF file."""
    for long, short in (
        ("model.embed_tokens", "token_embd"),
        ("model.layers", "blk"),
        ("model.norm", "output_norm"),
        *((long, short) for long, short, *_ in _MODULES),
    ):
        name = name.replace(long, short)
    return name


def dense_params(weights, *, scanned, dtype=jnp.float32):
    """Returns the tree of arrays, put together by hand from weights as PyTorch has them."""
    layers = []
    for n in range(LAYERS):
        flat = {}
        for name, _, path, axes in _MODULES:
            weight = np.asarray(weights[f"model.layers.{n}.{name}.weight"], np.float32)
            flat[path] = (weight if axes == ("out",) else weight.T).reshape(_SHAPES[path])
        layers.append(_nested(flat))
    own = {
        "embedding": np.asarray(weights["model.embed_tokens.weight"], np.float32),
        "norm": np.asarray(weights["model.norm.weight"], np.float32),
    }
    if scanned:
        own["layers"] = jax.tree.map(lambda *each: np.stack(each), *layers)
    else:
        own |= {f"layer_{n}": layer for n, layer in enumerate(layers)}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(dtype), own)


def model(params, tokens):
    """Returns the logits (batch, tokens, vocabulary); the output layer is the embedding."""
    x = params["embedding"][tokens]
    if "layers" in params:
        x, _ = jax.lax.scan(lambda x, layer: (_layer(layer, x), None), x, params["layers"])
    else:
        for n in range(LAYERS):
            x = _layer(params[f"layer_{n}"], x)
    return jnp.einsum("btd,vd->btv", _normed(x, params["norm"]), params["embedding"])


def _layer(params, x):
    attention, mlp = params["attention"], params["mlp"]
    y = _normed(x, params["attention_norm"])
    query, key, value = (
        jnp.einsum("btd,dhk->bhtk", y, attention[name]) for name in ("query", "key", "value")
    )
    scores = jnp.einsum("bhtk,bhsk->bhts", query, key) / HEAD_DIM**0.5
    mixed = jnp.einsum("bhts,bhsk->bhtk", jax.nn.softmax(scores), value)
    x = x + jnp.einsum("bhtk,hkd->btd", mixed, attention["out"])
    y = _normed(x, params["mlp_norm"])
    return x + (jax.nn.silu(y @ mlp["gate"]) * (y @ mlp["up"])) @ mlp["down"]


def _normed(x, scale):
    variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(variance + 1e-6) * scale.reshape((1,) * (x.ndim - 1) + (-1,))


def _nested(flat):
    tree = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _is_shape(node):
    return isinstance(node, tuple)


def _random(rng, shape):
    return (0.05 * rng.standard_normal(shape)).astype(np.float32)
