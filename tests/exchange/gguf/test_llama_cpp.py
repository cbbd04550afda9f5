"""Adapters in llama.cpp itself: with what `save` writes, it computes what JAX computes.

`make test-llamacpp` installs it; elsewhere these tests are skipped.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.exchange import gguf as exchange
from lora_jax.exchange.peft import Rule
from tests.exchange.gguf.in_llama_cpp import logits_in_llama_cpp
from tests.trained import as_if_trained

gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

LAYERS, VOCABULARY, WIDTH, HEADS, KEY_HEADS, DIM, HIDDEN, EXPERTS = 2, 48, 32, 4, 2, 8, 40, 3
EPSILON, BASE, CONTEXT = 1e-5, 10_000.0, 256
TOKENS = [3, 17, 42, 5, 5, 29, 8, 31]

HEADS_OUT, HEADS_IN = ("batch", "in", "out", "out"), ("batch", "in", "in", "out")
ATTENTION = {
    "query": ("attn_q", (WIDTH, HEADS, DIM), HEADS_OUT),
    "key": ("attn_k", (WIDTH, KEY_HEADS, DIM), HEADS_OUT),
    "value": ("attn_v", (WIDTH, KEY_HEADS, DIM), HEADS_OUT),
    "out": ("attn_output", (HEADS, DIM, WIDTH), HEADS_IN),
}
DENSE = {
    "gate": ("ffn_gate", (WIDTH, HIDDEN), ("batch", "in", "out")),
    "up": ("ffn_up", (WIDTH, HIDDEN), ("batch", "in", "out")),
    "down": ("ffn_down", (HIDDEN, WIDTH), ("batch", "in", "out")),
}
MIXED = {
    "router": ("ffn_gate_inp", (WIDTH, EXPERTS), ("batch", "in", "out")),
    **{
        name: (f"{short}_exps", (EXPERTS, *shape), ("batch", *axes))
        for name, (short, shape, axes) in DENSE.items()
    },
}
NORMS = {name: (f"{name}_norm", (WIDTH,), ("batch", "out")) for name in ("attn", "ffn")}


def architecture(kind):
    return "llama" if kind == "experts" else kind


def modules(kind):
    """Returns the weights of a layer: name in a file, shape and axes."""
    return {**ATTENTION, **(MIXED if kind == "experts" else DENSE), **NORMS}


def rules(kind):
    return [
        *(
            Rule(
                f"blk.{{n}}.{short}.weight",
                f"layers/{name}",
                axes=axes,
                kind="parameter" if short.endswith("_exps") else "linear",
            )
            for name, (short, _, axes) in modules(kind).items()
        ),
        Rule("token_embd.weight", "embedding", kind="embedding"),
        Rule("output_norm.weight", "norm"),
        Rule("output.weight", "head"),
    ]


def params(kind):
    rng = np.random.default_rng(0)

    def random(*shape, mean=0.0):
        return jnp.asarray(mean + 0.3 * rng.standard_normal(shape), jnp.float32)

    return {
        "embedding": random(VOCABULARY, WIDTH),
        "norm": random(WIDTH, mean=1.0),
        "head": random(WIDTH, VOCABULARY),
        "layers": {
            name: random(LAYERS, *shape, mean=float(name in NORMS))
            for name, (_, shape, _) in modules(kind).items()
        },
    }


def model(tree, tokens):
    """Returns the logits (tokens, vocabulary) of Llama, whose heads rotate their halves."""
    x, _ = jax.lax.scan(layer, tree["embedding"][tokens], tree["layers"])
    return normed(x, tree["norm"]) @ tree["head"]


def layer(x, weights):
    y = normed(x, weights["attn"])
    query, key, value = (
        jnp.einsum("td,dhk->thk", y, weights[name]) for name in ("query", "key", "value")
    )
    key, value = (jnp.repeat(each, HEADS // KEY_HEADS, axis=1) for each in (rotated(key), value))
    scores = jnp.einsum("thk,shk->hts", rotated(query), key) / DIM**0.5
    seen = jnp.tril(jnp.ones((x.shape[0], x.shape[0]), bool))
    mixed = jnp.einsum("hts,shk->thk", jax.nn.softmax(jnp.where(seen, scores, -1e30)), value)
    x = x + jnp.einsum("thk,hkd->td", mixed, weights["out"])
    y = normed(x, weights["ffn"])
    if "router" not in weights:
        hidden = jax.nn.silu(y @ weights["gate"]) * (y @ weights["up"])
        return x + hidden @ weights["down"], None
    # Every token goes to all experts, so that no choice hangs on rounding.
    gate, up = (jnp.einsum("td,edf->etf", y, weights[name]) for name in ("gate", "up"))
    each = jnp.einsum("etf,efd->etd", jax.nn.silu(gate) * up, weights["down"])
    return x + jnp.einsum("te,etd->td", jax.nn.softmax(y @ weights["router"]), each), None


def normed(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPSILON) * scale


def rotated(x):
    positions = jnp.arange(x.shape[0], dtype=jnp.float32)
    angles = positions[:, None] / BASE ** (jnp.arange(0.0, DIM, 2) / DIM)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def logits(tree):
    with jax.numpy_rank_promotion("allow"):
        return np.asarray(lora_jax.adapt(model)(tree, jnp.asarray(TOKENS)))


def write_model(path, kind, tree):
    """Writes the file of a model with a vocabulary that has no texts."""
    writer = gguf.GGUFWriter(path, architecture(kind))
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_dimension_count(DIM)
    writer.add_rope_freq_base(BASE)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")
    if kind == "experts":
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(EXPERTS)
    for tensor, value in tensors(kind, tree).items():
        writer.add_tensor(tensor, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(kind, tree):
    tree = jax.tree.map(np.asarray, tree)
    found = {
        "token_embd.weight": tree["embedding"],
        "output_norm.weight": tree["norm"],
        "output.weight": tree["head"].T,
    }
    if kind == "qwen2":
        sizes = {"attn_q": HEADS, "attn_k": KEY_HEADS, "attn_v": KEY_HEADS}
        for n in range(LAYERS):
            for short, heads in sizes.items():
                found[f"blk.{n}.{short}.bias"] = np.zeros(heads * DIM, np.float32)
    for name, (short, shape, axes) in modules(kind).items():
        inputs = int(np.prod([s for s, axis in zip(shape, axes[1:], strict=True) if axis == "in"]))
        for n in range(LAYERS):
            value = tree["layers"][name][n]
            if "in" in axes:
                lead = shape[:1] if axes[1] == "batch" else ()
                value = value.reshape(*lead, inputs, -1).swapaxes(-1, -2)
            if kind != "qwen2" and short in {"attn_q", "attn_k"}:
                halves = value.reshape(-1, 2, DIM // 2, WIDTH)
                value = halves.swapaxes(1, 2).reshape(value.shape)
            found[f"blk.{n}.{short}.weight"] = value
    return found


def in_llama_cpp(path, adapter=None, scale=1.0):
    return logits_in_llama_cpp(path, TOKENS, adapter, scale)


def wrapped(kind, targets, **settings):
    axes = {f"layers/{name}": axes for name, (_, _, axes) in modules(kind).items()}
    settings = {"rank": 3, "alpha": 2, **settings}
    return as_if_trained(lora_jax.wrap(params(kind), targets, axes=axes, **settings))


def error(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


ALL = r"layers/(?!attn|ffn).*"
CASES = {
    "every matrix": (ALL, {}),
    "scales that differ": ({"layers/(query|key)": {"alpha": 1.5}, "layers/(up|out)": {}}, {}),
    "rsLoRA": (ALL, {"rslora": True}),
    "the lookup and the output layer": ("embedding|head|layers/query", {}),
    "some layers": ("layers/(query|down)", {"layers": (1,)}),
    "PiSSA": ("layers/(query|value|out)", {"init": "pissa"}),
}


@pytest.fixture(scope="module", params=["llama", "qwen2", "experts"])
def file(request, tmp_path_factory):
    kind = request.param
    path = tmp_path_factory.mktemp(kind) / "model.gguf"
    return kind, write_model(path, kind, params(kind))


def test_the_model_itself(file):
    kind, path = file
    assert error(in_llama_cpp(path), logits(params(kind))) < 1e-5


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_adapters(file, tmp_path, case, scale):
    kind, path = file
    targets, settings = CASES[case]
    tree = wrapped(kind, targets, **settings)
    adapter = tmp_path / "adapter.gguf"
    exchange.save(adapter, tree, names=rules(kind), architecture=architecture(kind))
    found = in_llama_cpp(path, adapter, scale)
    base, whole = params(kind), lora_jax.merge(tree)
    expected = logits(jax.tree.map(lambda a, b: a + scale * (b - a), base, whole))
    assert error(found, expected) < 1e-4
    # The premise: it does something.
    assert error(found, logits(base)) > 0.01


def test_one_leaf_that_is_the_lookup_and_the_output_layer(tmp_path):
    """Where the model's file holds the weight twice, each gets the adapter."""
    plain = params("llama")
    path = write_model(tmp_path / "model.gguf", "llama", with_tied_head(plain))
    del plain["head"]
    tree = as_if_trained(lora_jax.wrap(plain, "embedding", rank=3, alpha=2))
    *layers, lookup, norm, _ = rules("llama")
    names = [*layers, dataclasses.replace(lookup, tied="output.weight"), norm]
    adapter = tmp_path / "adapter.gguf"
    exchange.save(adapter, tree, names=names, architecture="llama")
    expected = logits(with_tied_head(lora_jax.merge(tree)))
    assert error(in_llama_cpp(path, adapter), expected) < 1e-4


def with_tied_head(tree):
    return {**tree, "head": tree["embedding"].T}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_other_order_of_rows_is_another_model(tmp_path, kind):
    path = write_model(tmp_path / "model.gguf", kind, params(kind))
    tree = wrapped(kind, "layers/(query|key)")
    names, adapter = rules(kind), tmp_path / "adapter.gguf"
    exchange.save(adapter, tree, names=names, architecture=kind, permuted=kind != "llama")
    assert error(in_llama_cpp(path, adapter), logits(tree)) > 0.01


def test_an_adapter_of_another_architecture_is_not_accepted(tmp_path):
    """The premise of the tests above: what llama.cpp refuses does not go unseen."""
    path = write_model(tmp_path / "model.gguf", "llama", params("llama"))
    adapter = tmp_path / "adapter.gguf"
    exchange.save(adapter, wrapped("llama", ALL), names=rules("llama"), architecture="qwen2")
    with pytest.raises((RuntimeError, AssertionError), match="(?i)failed to|refused"):
        in_llama_cpp(path, adapter)
