"""A small model with adapters, and what llama.cpp computes with them, in NumPy."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from lora_jax.exchange import gguf as exchange
from lora_jax.exchange.peft import Rule
from tests.trained import as_if_trained

LAYERS, VOCABULARY, WIDTH, HEADS, KEY_HEADS, HEAD_DIM, HIDDEN = 3, 11, 16, 4, 2, 6, 10

HEADS_OUT, HEADS_IN = ("in", "out", "out"), ("in", "in", "out")
# Of each tensor of a layer, its name in a file, its path, its shape and its axes.
MODULES = (
    ("attn_q", "attention/query", (WIDTH, HEADS, HEAD_DIM), HEADS_OUT),
    ("attn_k", "attention/key", (WIDTH, KEY_HEADS, HEAD_DIM), HEADS_OUT),
    ("attn_v", "attention/value", (WIDTH, KEY_HEADS, HEAD_DIM), HEADS_OUT),
    ("attn_output", "attention/out", (HEADS, HEAD_DIM, WIDTH), HEADS_IN),
    ("ffn_gate", "mlp/gate", (WIDTH, HIDDEN), ("in", "out")),
    ("ffn_up", "mlp/up", (WIDTH, HIDDEN), ("in", "out")),
    ("ffn_down", "mlp/down", (HIDDEN, WIDTH), ("in", "out")),
)
SHAPES = {path: shape for _, path, shape, _ in MODULES}
AXES = {path: axes for _, path, _, axes in MODULES}
TARGETS = "attention|mlp"


def rules(*, scanned):
    stack = ("batch",) if scanned else ()
    return [
        *(
            Rule(
                f"blk.{{n}}.{name}.weight",
                f"layers/{path}" if scanned else f"layer_{{n}}/{path}",
                axes=(*stack, *axes),
            )
            for name, path, _, axes in MODULES
        ),
        Rule("token_embd.weight", "embedding", kind="embedding"),
        Rule("output.weight", "head"),
    ]


def params(*, scanned):
    rng = np.random.default_rng(0)

    def random(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    def layer(*stack):
        tree = {"attention": {}, "mlp": {}}
        for path, shape in SHAPES.items():
            part, name = path.split("/")
            tree[part][name] = random(*stack, *shape)
        return tree

    ends = {"embedding": random(VOCABULARY, WIDTH), "head": random(WIDTH, VOCABULARY)}
    if scanned:
        return {**ends, "layers": layer(LAYERS)}
    return {**ends, **{f"layer_{n}": layer() for n in range(LAYERS)}}


def wrapped(targets=TARGETS, *, scanned=True, **settings):
    """Returns a trained tree."""
    stack = ("batch",) if scanned else ()
    prefix = "layers" if scanned else "layer_.*"
    axes = {f"{prefix}/{path}": (*stack, *own) for path, own in AXES.items()}
    settings = {"rank": 2, "alpha": 3, **settings}
    return as_if_trained(lora_jax.wrap(params(scanned=scanned), targets, axes=axes, **settings))


def save(path, tree, *, scanned=True, **options):
    settings = {"names": rules(scanned=scanned), "architecture": "llama", **options}
    exchange.save(path, tree, **settings)
    return path


def read(path):
    """Returns the fields and the tensors of a file, as the package gguf reads them."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if "." in name}
    fields.pop("GGUF.version", None)
    tensors = {}
    for tensor in reader.tensors:
        assert tensor.tensor_type.name == "F32"
        assert tuple(tensor.data.shape) == tuple(reversed(tensor.shape.tolist()))
        tensors[tensor.name] = np.array(tensor.data)
    return {name: value for name, value in fields.items() if not name.startswith("GGUF.")}, tensors


def weights(tree, *, scanned=True, permutes=True):
    """Returns the tensors of a model's file, as llama.cpp's converter writes them."""
    tree = jax.tree.map(np.asarray, tree)
    found = {"token_embd.weight": tree["embedding"], "output.weight": tree["head"].T}
    for n in range(LAYERS):
        for name, path, shape, axes in MODULES:
            part, last = path.split("/")
            leaf = tree["layers"][part][last][n] if scanned else tree[f"layer_{n}"][part][last]
            inputs = int(np.prod([s for s, axis in zip(shape, axes, strict=True) if axis == "in"]))
            matrix = leaf.reshape(inputs, -1).T
            if permutes and name in {"attn_q", "attn_k"}:
                matrix = interleaved(matrix, HEADS if name == "attn_q" else KEY_HEADS)
            found[f"blk.{n}.{name}.weight"] = matrix
    return found


def interleaved(matrix, heads):
    """Returns the rows of a matrix as `LlamaModel.permute` orders them, one by one."""
    rows, dim = [], len(matrix) // heads
    for head in range(heads):
        for pair in range(dim // 2):
            rows += [head * dim + pair, head * dim + dim // 2 + pair]
    return matrix[rows]


def applied(base, fields, tensors, user_scale=1.0):
    """Returns the weights with which llama.cpp computes, in float64."""
    alpha = np.float32(fields["adapter.lora.alpha"])
    found = {name: tensor.astype(np.float64) for name, tensor in base.items()}
    for key in tensors:
        name, part = key.rsplit(".", 1)
        if part == "lora_b":
            continue
        A, B = (tensors[f"{name}.{each}"].astype(np.float64) for each in ("lora_a", "lora_b"))
        rank = B.shape[-1]
        scale = user_scale * (float(alpha / np.float32(rank)) if alpha else 1.0)
        change = A @ B.T if name == "token_embd.weight" else B @ A
        assert change.shape == base[name].shape
        found[name] = found[name] + scale * change
    return found


def assert_applies(path, tree, *, scanned=True, permutes=True):
    """Asserts that a file changes a model's file as `merge` changes the tree."""
    fields, tensors = read(path)
    options = {"scanned": scanned, "permutes": permutes}
    found = applied(weights(lora_jax.unwrap(tree), **options), fields, tensors)
    expected = weights(lora_jax.merge(tree), **options)
    assert found.keys() == expected.keys()
    for name in expected:
        error = np.linalg.norm(found[name] - expected[name]) / np.linalg.norm(expected[name])
        assert error < 1e-6, name
    return fields, tensors


def rules_without():
    """Returns the rules without that of the keys."""
    return [rule for rule in rules(scanned=True) if "attn_k" not in rule.name]
