"""Folders of merged models: every kind of leaf, several files, and nothing half-written."""

import json

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from lora_jax.checkpoint import CheckpointError
from lora_jax.exchange import huggingface, place
from lora_jax.exchange.huggingface import _save
from lora_jax.exchange.peft import Rule
from tests.agreement import assert_agree, assert_identical
from tests.arrays import random
from tests.trained import as_if_trained

pytest.importorskip("safetensors")

RULES = [
    Rule("embed.weight", "embed", kind="embedding", tied="head.weight"),
    Rule("layers.{n}.query.weight", "layers/query", axes=("batch", "in", "out", "out")),
    Rule("layers.{n}.up.weight", "layers/up"),
    Rule("layers.{n}.up.bias", "layers/bias"),
    Rule("norm.weight", "norm"),
]
AXES = {"query": ("batch", "in", "out", "out"), "up": ("batch", "in", "out")}
PARAMS = {
    "embed": random(11, 64, seed=0),
    "layers": {
        "query": random(3, 64, 2, 4, seed=1),
        "up": random(3, 64, 5, seed=2),
        "bias": random(3, 5, seed=3),
    },
    "norm": random(64, seed=4),
}


def read(folder):
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), PARAMS)
    with huggingface.tensors(folder) as tensors:
        return place(tensors, shapes, names=RULES)


TREES = {
    "plain": lambda: PARAMS,
    "wrapped": lambda: as_if_trained(lora_jax.wrap(PARAMS, "query|up|embed", rank=2, axes=AXES)),
    "some layers": lambda: as_if_trained(
        lora_jax.wrap(PARAMS, "query|up", rank=2, axes=AXES, layers=[0, 2])
    ),
    "dora": lambda: as_if_trained(lora_jax.wrap(PARAMS, "query|up", rank=2, axes=AXES, dora=True)),
    "changed base": lambda: as_if_trained(
        lora_jax.wrap(PARAMS, "query|up", rank=2, axes=AXES, init="pissa")
    ),
    "in full": lambda: lora_jax.wrap(PARAMS, "query", rank=2, axes=AXES, train="norm|bias"),
    "quantised": lambda: as_if_trained(
        lora_jax.wrap(
            lora_jax.quantize(PARAMS, "up", format="int8", block=32, axes=AXES),
            "query|up",
            rank=2,
            axes=AXES,
        )
    ),
}


@pytest.mark.parametrize("shard_bytes", [10**9, 4000], ids=["one file", "several"])
@pytest.mark.parametrize("kind", TREES)
def test_a_folder_holds_the_merged_model(tmp_path, kind, shard_bytes):
    tree, folder = TREES[kind](), tmp_path / "model"
    huggingface.save(folder, tree, names=RULES, shard_bytes=shard_bytes)
    merged = jax.tree.map(
        lambda leaf: leaf.dequantize() if hasattr(leaf, "dequantize") else leaf,
        lora_jax.merge(tree) if kind != "plain" else tree,
        is_leaf=lambda leaf: hasattr(leaf, "dequantize"),
    )
    # A layer by itself is merged by another program than a stack.
    compare = assert_identical if kind in ("plain", "in full") else assert_agree
    compare(read(folder), merged)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard_bytes == 4000)


def test_the_index_names_every_tensor(tmp_path):
    folder = tmp_path / "model"
    (tmp_path / "tokenizer.json").write_text("{}")
    huggingface.save(
        folder,
        PARAMS,
        names=RULES,
        shard_bytes=4000,
        config={"model_type": "own"},
        files=[tmp_path / "tokenizer.json"],
    )
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == 11
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(PARAMS))
    assert json.loads((folder / "config.json").read_text()) == {"model_type": "own"}
    assert (folder / "tokenizer.json").exists()
    assert all((folder / name).stat().st_size < 8000 for name in index["weight_map"].values())


def test_dtypes_are_kept(tmp_path):
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    huggingface.save(tmp_path / "model", narrow, names=RULES)
    with huggingface.tensors(tmp_path / "model") as tensors:
        assert {tensor.dtype for tensor in tensors.values()} == {jnp.dtype(jnp.bfloat16)}


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [10**9, 4000], ids=["one file", "several"])
def test_files_have_the_names_of_diffusers(tmp_path, shard_bytes):
    folder = tmp_path / "model"
    stem = "diffusion_pytorch_model"
    huggingface.save(folder, PARAMS, names=RULES, stem=stem, shard_bytes=shard_bytes)
    assert all(file.name.startswith(stem) for file in folder.iterdir())
    assert_identical(read(folder), PARAMS)
    huggingface.save(folder, PARAMS, names=RULES, overwrite=True)
    assert not list(folder.glob(f"{stem}*"))
    with pytest.raises(ValueError, match="`stem` is 'other'; expected one of"):
        huggingface.save(folder, PARAMS, names=RULES, stem="other", overwrite=True)


def without_rule(folder):
    huggingface.save(folder, PARAMS, names=RULES[:-1])


def several_adapters(folder):
    wrapped = lora_jax.wrap(PARAMS, "up", rank=2, axes=AXES)
    huggingface.save(folder, lora_jax.serving.bank([wrapped]), names=RULES)


def not_finite(folder):
    huggingface.save(folder, {**PARAMS, "norm": PARAMS["norm"] * jnp.nan}, names=RULES)


def missing_file(folder):
    huggingface.save(folder, PARAMS, names=RULES, files=[folder.parent / "nothing.json"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (without_rule, "`names` has no rule for 'norm'"),
        (several_adapters, "holds several adapters at 'layers/up'"),
        (not_finite, "`params` has 64 of 64 values in 'norm.weight' that are not finite"),
        (missing_file, r"`files` has '.*nothing.json'; expected files"),
    ],
)
def test_nothing_is_written(tmp_path, call, message):
    with pytest.raises(CheckpointError, match=message):
        call(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    huggingface.save(folder, PARAMS, names=RULES)
    before = (folder / "model.safetensors").read_bytes()

    def fail(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(_save, "_write_rest", fail)
    other = jax.tree.map(jnp.zeros_like, PARAMS)
    with pytest.raises(CheckpointError, match="no space left"):
        huggingface.save(folder, other, names=RULES, overwrite=True)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_only_a_model_is_replaced(tmp_path):
    folder = tmp_path / "model"
    huggingface.save(folder, PARAMS, names=RULES)
    with pytest.raises(CheckpointError, match="holds a model; save.*overwrite=True"):
        huggingface.save(folder, PARAMS, names=RULES)
    huggingface.save(folder, PARAMS, names=RULES, overwrite=True)
    # Also where the name ends as a model's files do.
    for name in ("thesis.tex", "results.json", "notes.txt", "other.safetensors"):
        (folder / name).write_text("")
        with pytest.raises(CheckpointError, match=f"holds '{name}', which is not part of a model"):
            huggingface.save(folder, PARAMS, names=RULES, overwrite=True)
        (folder / name).unlink()
    with pytest.raises(ValueError, match="`shard_bytes` is 0; expected a positive number"):
        huggingface.save(tmp_path / "other", PARAMS, names=RULES, shard_bytes=0)
