"""Placing tensors of PyTorch models in parameter trees, as arrays and as codes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lora_jax
from lora_jax import CheckpointError
from lora_jax.exchange import gguf as gguf_files
from lora_jax.exchange import place
from lora_jax.exchange.peft import Rule
from lora_jax.quantization import QuantizedWeight
from tests.exchange import llama

TOKENS = (jnp.arange(10).reshape(2, 5) * 5 + 1) % llama.VOCABULARY


def is_matrix(weight):
    return weight.ndim == 2


def read_gguf(weights, kind, tmp_path):
    """Returns the tensors of a file in that type, and what gguf makes of them, by PyTorch's names.

    gguf quantises to no "K" type: of those, random blocks of weights as small are drawn.
    """
    gguf = pytest.importorskip("gguf")
    files = pytest.importorskip("tests.exchange.gguf.files")
    tensors, dense = {}, {}
    for seed, (name, weight) in enumerate(weights.items()):
        if not is_matrix(weight):
            tensors[llama.gguf_name(name)], dense[name] = weight, weight
            continue
        if kind.endswith("_K"):
            data = files.random_blocks(kind, weight.shape, seed, scale=2e-4)
        else:
            data = gguf.quantize(weight, files.TYPES[kind])
        tensors[llama.gguf_name(name)] = (kind, data)
        dense[name] = gguf.dequantize(data, files.TYPES[kind])
    return gguf_files.load(files.write(tmp_path / "model.gguf", tensors)), dense


def read_bitsandbytes(weights, kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    torch = pytest.importorskip("torch")
    files = pytest.importorskip("tests.exchange.bitsandbytes.files")
    tensors, dense = {}, {}
    for name, weight in weights.items():
        tensors[name], dense[name] = torch.tensor(weight), weight
        # transformers quantises linear layers alone.
        if is_matrix(weight) and "embed" not in name:
            options = {"quant_type": kind, "compress_statistics": True}
            tensors[name], dequantised = files.quantised(tensors[name], **options)
            dense[name] = dequantised.numpy()
    path = files.write(tmp_path / "model.safetensors", tensors)
    return lora_jax.exchange.bitsandbytes.load(path), dense


READERS = {
    **dict.fromkeys(("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"), read_gguf),
    **dict.fromkeys(("nf4", "fp4"), read_bitsandbytes),
}


@pytest.mark.parametrize(
    ("kind", "scanned"), [*((kind, True) for kind in READERS), ("Q4_K", False), ("nf4", False)]
)
def test_a_language_model(kind, scanned, tmp_path):
    read = READERS[kind]
    tensors, dense = read(llama.torch_weights(), kind, tmp_path)
    params = place(
        tensors,
        llama.abstract_params(scanned=scanned),
        names=llama.rules(gguf=read is read_gguf, scanned=scanned),
    )
    reference = llama.dense_params(dense, scanned=scanned)

    # The numbers are those of the file, and the codes take its bytes.
    dequantised = lora_jax.quantization.dequantize(params)
    jax.tree.map(np.testing.assert_array_equal, dequantised, reference)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) == sum(
        leaf.nbytes for leaf in jax.tree.leaves(tensors)
    )
    query = params["layers" if scanned else "layer_0"]["attention"]["query"]
    assert isinstance(query, QuantizedWeight)
    assert query.batch_ndim == scanned

    # And they compute, with adapters and without, as the dense model does.
    plain, adapt = jax.jit(llama.model), jax.jit(lora_jax.adapt(llama.model))
    expected = plain(reference, TOKENS)
    found = adapt(params, TOKENS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    axes = lora_jax.infer_axes(llama.model, reference, TOKENS)
    wrapped = trained(lora_jax.wrap(params, "attention|mlp", rank=2, axes=axes))
    found = adapt(wrapped, TOKENS)
    merged = lora_jax.quantization.dequantize(lora_jax.merge(wrapped))
    adapted = plain(merged, TOKENS)
    assert np.abs(adapted - expected).max() > 0.01 * np.abs(expected).max()
    np.testing.assert_allclose(found, adapted, rtol=1e-4, atol=1e-4 * np.abs(adapted).max())


def trained(wrapped):
    """Returns a wrapped tree with random factors."""
    adapters, frozen = lora_jax.split(wrapped)
    leaves, structure = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [
        0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)
    ]
    return lora_jax.combine(jax.tree.unflatten(structure, drawn), frozen)


def test_layers_of_several_types(tmp_path):
    """As files have them whose name ends in _K_M."""
    files = pytest.importorskip("tests.exchange.gguf.files")
    kinds = ("Q4_K", "Q6_K")
    tensors = {
        f"blk.{n}.ffn_down.weight": (kind, files.random_blocks(kind, (4, 256)))
        for n, kind in enumerate(kinds)
    }
    tensors = gguf_files.load(files.write(tmp_path / "model.gguf", tensors))
    name = "blk.{n}.ffn_down.weight"
    stack = {"down": jax.ShapeDtypeStruct((2, 256, 4), jnp.float32)}
    with pytest.raises(CheckpointError, match=r"'blk\.0\.ffn_down\.weight: uint4', 'blk\.1.*int6"):
        place(tensors, stack, names=[Rule(name, "down")])
    flat = {f"down_{n}": jax.ShapeDtypeStruct((256, 4), jnp.float32) for n in range(2)}
    placed = place(tensors, flat, names=[Rule(name, "down_{n}")])
    assert [placed[f"down_{n}"].format for n in range(2)] == ["uint4", "int6"]
    dense = {name: tensor.dequantize() for name, tensor in tensors.items()}
    assert place(dense, stack, names=[Rule(name, "down")])["down"].shape == (2, 256, 4)


def kernel(shape=(8, 12), **options):
    """Returns a quantised weight as PyTorch has it, (out, in)."""
    array = jax.random.normal(jax.random.key(0), shape)
    axes = {"w": ("out", "in")}
    return lora_jax.quantize({"w": array}, "w", axes=axes, block=4, **options)["w"]


def test_leaves_have_the_dtype_of_params():
    weight = kernel()
    params = {"a": jnp.zeros((12, 8), jnp.bfloat16), "b": jnp.zeros(3, jnp.bfloat16)}
    tensors = {"a": weight, "b": np.ones(3, np.float32) / 3}
    placed = place(tensors, params, names=[Rule("{name}", "{name}")])
    assert [leaf.dtype for leaf in placed.values()] == [jnp.bfloat16, jnp.bfloat16]
    np.testing.assert_array_equal(
        placed["a"].dequantize(), weight.dequantize().T.astype(jnp.bfloat16)
    )
    assert isinstance(placed["b"], jax.Array)


def test_leaves_are_cut_as_params_are():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec(None, "x")
    sharding = NamedSharding(mesh, spec)
    params = {name: jax.ShapeDtypeStruct((12, 8), jnp.float32, sharding=sharding) for name in "ab"}
    weight = kernel(format="int8")
    tensors = {"a": weight, "b": np.asarray(weight.dequantize())}
    placed = place(tensors, params, names=[Rule("{name}", "{name}")])
    assert placed["a"].sharding.is_equivalent_to(sharding, 2)
    assert placed["a"].codes.sharding.shard_shape(placed["a"].codes.shape) == (12, 2)
    assert placed["b"].sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(placed["a"].dequantize(), placed["b"])


def test_a_stack_behind_other_axes():
    params = {"w": jnp.zeros((12, 3, 8))}
    rule = Rule("layer.{n}", "w", axes=("in", "batch", "out"))
    arrays = {f"layer.{n}": np.full((8, 12), n, np.float32) for n in range(3)}
    placed = place(arrays, params, names=[rule])["w"]
    np.testing.assert_array_equal(
        placed, np.broadcast_to(np.arange(3.0)[None, :, None], (12, 3, 8))
    )
    with pytest.raises(CheckpointError, match=r"along the axes \(1,\).*only along its first ones"):
        place(dict.fromkeys(arrays, kernel()), params, names=[rule])


def test_kept_leaves():
    params = {"w": jnp.zeros((12, 8)), "cache": {"angles": jnp.arange(3.0)}}
    rule = Rule("w", "w")
    with pytest.raises(CheckpointError, match=r"'cache/angles' have no rule.*keep="):
        place({"w": kernel()}, params, names=[rule])
    placed = place({"w": kernel()}, params, names=[rule], keep="cache")
    assert placed["cache"]["angles"] is params["cache"]["angles"]
    with pytest.raises(ValueError, match="`keep`"):
        place({"w": kernel()}, params, names=[rule], keep="cash")


def test_everything_finds_a_place():
    params = {"a": jnp.zeros((12, 8)), "b": jnp.zeros((12, 8))}
    rules = [Rule("model.{name}.weight", "{name}")]
    with pytest.raises(CheckpointError) as raised:
        place({"model.a.weight": kernel(), "model.aa.weight": kernel()}, params, names=rules)
    message = str(raised.value)
    assert "'model.aa.weight' have no place" in message
    assert "nearest names to the first are 'model.a.weight'" in message
    assert "'b' is 'model.b.weight' in PyTorch, which `tensors` do not hold" in message
    # A tensor of a leaf that is kept has no place either.
    tensors = {"model.a.weight": kernel(), "model.b.weight": kernel()}
    with pytest.raises(CheckpointError, match=r"'model\.b\.weight' have no place"):
        place(tensors, params, names=rules, keep="b")


@pytest.mark.parametrize(
    ("leaf", "options", "message"),
    [
        ((12, 9), {}, r"'w' has the shape \(8, 12\); expected \(9, 12\) for 'w'"),
        ((12, 2, 4), {}, "no axes for 'w'"),
        ((8, 12), {"axes": ("out", "out")}, r"has the shape \(8, 12\); expected \(96,\)"),
    ],
)
def test_what_does_not_fit(leaf, options, message):
    with pytest.raises(CheckpointError, match=message):
        place({"w": kernel()}, {"w": jnp.zeros(leaf)}, names=[Rule("w", "w", **options)])


def test_blocks_across_rows():
    """As bitsandbytes has them where the inputs are not a multiple of the block."""
    flat = lora_jax.quantize({"w": jnp.arange(96.0)[:, None]}, "w", format="int8", block=5)["w"]
    weight = flat.reshape((8, 12))
    assert weight.features == ()
    rule = Rule("w", "w", axes=("in", "out", "out"))
    placed = place({"w": weight}, {"w": jnp.zeros((12, 2, 4))}, names=[rule])["w"]
    expected = np.asarray(weight.dequantize()).T.reshape(12, 2, 4)
    np.testing.assert_array_equal(placed.dequantize(), expected)


def test_a_leaf_that_is_two_parameters():
    params = {"embedding": jnp.zeros((8, 12))}
    rules = [Rule("embed.weight", "embedding", kind="embedding", tied="head.weight")]
    weight = kernel()
    for names in (["embed.weight"], ["head.weight"], ["embed.weight", "head.weight"]):
        placed = place(dict.fromkeys(names, weight), params, names=rules)["embedding"]
        np.testing.assert_array_equal(placed.dequantize(), weight.dequantize())
    other = dataclasses.replace(weight, codes=weight.codes ^ 1)
    with pytest.raises(CheckpointError, match=r"'embed\.weight', 'head\.weight'.*which differ"):
        place({"embed.weight": weight, "head.weight": other}, params, names=rules)


def test_wrapped_params_are_refused():
    wrapped = lora_jax.wrap({"w": jnp.ones((12, 8))}, "w", rank=2)
    with pytest.raises(CheckpointError, match=r"place\(tensors, unwrap\(params\)"):
        place({"w": kernel()}, wrapped, names=[Rule("w", "w")])


@pytest.mark.parametrize(
    "changed",
    [{"format": "uint4"}, {"offsets": jnp.ones((1, 8))}, {"codebook": jnp.linspace(-1, 1, 16)}],
)
def test_an_initialiser_does_not_quantise_to_what_only_files_have(changed):
    weight = kernel(format="nf4").transpose((1, 0))
    params = {"w": dataclasses.replace(weight, **changed)}
    wrapped = lora_jax.wrap(params, "w", rank=2)
    assert wrapped["w"].base.codes is weight.codes
    with pytest.raises(ValueError, match="is read from files, and nothing is quantised to it"):
        lora_jax.wrap(params, "w", rank=2, init="pissa")
