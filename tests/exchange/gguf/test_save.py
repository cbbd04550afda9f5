"""Writing LoRA files: as gguf reads them, and against what llama.cpp computes, in NumPy."""

import dataclasses
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import CheckpointError, _folders
from lora_jax.exchange import gguf as exchange
from lora_jax.exchange.peft import Rule
from tests.folders import contents
from tests.trained import as_if_trained

gguf = pytest.importorskip("gguf")

from tests.exchange.gguf.adapted import (  # noqa: E402
    AXES,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KEY_HEADS,
    LAYERS,
    MODULES,
    TARGETS,
    VOCABULARY,
    WIDTH,
    applied,
    assert_applies,
    interleaved,
    params,
    read,
    rules,
    save,
    weights,
    wrapped,
)
from tests.exchange.gguf.files import write  # noqa: E402


class TestWrittenFiles:
    @pytest.mark.parametrize("scanned", [True, False])
    def test_llama(self, tmp_path, scanned):
        tree = wrapped(scanned=scanned)
        path = save(tmp_path / "adapter.gguf", tree, scanned=scanned)
        fields, tensors = assert_applies(path, tree, scanned=scanned)
        assert fields == {
            "general.architecture": "llama",
            "general.type": "adapter",
            "adapter.type": "lora",
            "adapter.lora.alpha": 3.0,
        }
        names = {f"blk.{n}.{name}.weight" for n in range(LAYERS) for name, *_ in MODULES}
        assert tensors.keys() == {f"{name}.lora_{x}" for name in names for x in "ab"}
        assert tensors["blk.0.attn_k.weight.lora_a"].shape == (2, WIDTH)
        assert tensors["blk.0.attn_k.weight.lora_b"].shape == (KEY_HEADS * HEAD_DIM, 2)
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
    def test_architectures_whose_rows_stay(self, tmp_path, architecture):
        tree = wrapped()
        path = save(tmp_path / "adapter.gguf", tree, architecture=architecture)
        fields, _ = assert_applies(path, tree, permutes=False)
        assert fields["general.architecture"] == architecture

    def test_a_tree_that_has_the_rows_of_a_file(self, tmp_path):
        tree = wrapped()
        assert_applies(save(tmp_path / "a.gguf", tree, permuted=False), tree, permutes=False)

    def test_another_architecture_with_other_rows(self, tmp_path):
        tree = wrapped()
        path = save(tmp_path / "a.gguf", tree, architecture="granite", permuted=True)
        assert_applies(path, tree)

    def test_flat_heads(self, tmp_path):
        """Where no axis is that of a head, `head_dim` says how long one is."""
        flat = {"query": jnp.ones((WIDTH, HEADS * HEAD_DIM))}
        adapted = as_if_trained(lora_jax.wrap(flat, "query", rank=2))
        names = [Rule("blk.0.attn_q.weight", "query")]
        path = save(tmp_path / "a.gguf", adapted, names=names, head_dim=HEAD_DIM)
        _, tensors = read(path)
        rows = np.asarray(adapted["query"].lora_B).T
        np.testing.assert_array_equal(
            tensors["blk.0.attn_q.weight.lora_b"], interleaved(rows, HEADS)
        )

    def test_some_layers(self, tmp_path):
        tree = wrapped(layers=(0, 2))
        _, tensors = assert_applies(save(tmp_path / "a.gguf", tree), tree)
        assert {key.split(".")[1] for key in tensors} == {"0", "2"}

    def test_an_initialiser_that_changes_the_base(self, tmp_path):
        tree = wrapped(init="pissa")
        assert tree["layers"]["mlp"]["up"].initial_A is not None
        fields, tensors = read(save(tmp_path / "a.gguf", tree))
        assert tensors["blk.0.ffn_up.weight.lora_a"].shape == (4, WIDTH)
        original = weights(params(scanned=True))
        found = applied(original, fields, tensors)
        for name, expected in weights(lora_jax.merge(tree)).items():
            error = np.linalg.norm(found[name] - expected) / np.linalg.norm(expected)
            assert error < 1e-5, name

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_factors_of_half_precision(self, tmp_path, dtype):
        tree = wrapped(dtype=dtype)
        assert tree["layers"]["mlp"]["up"].lora_A.dtype == dtype
        _, tensors = read(save(tmp_path / "a.gguf", tree))
        own = np.asarray(tree["layers"]["mlp"]["up"].lora_A[1]).T.astype(np.float32)
        np.testing.assert_array_equal(tensors["blk.1.ffn_up.weight.lora_a"], own)

    def test_a_lookup_and_an_output_layer(self, tmp_path):
        tree = wrapped("embedding|head|mlp")
        _, tensors = assert_applies(save(tmp_path / "a.gguf", tree), tree)
        assert tensors["token_embd.weight.lora_a"].shape == (VOCABULARY, 2)
        assert tensors["token_embd.weight.lora_b"].shape == (WIDTH, 2)
        assert tensors["output.weight.lora_a"].shape == (2, WIDTH)
        assert tensors["output.weight.lora_b"].shape == (VOCABULARY, 2)

    def test_one_leaf_for_two_tensors(self, tmp_path):
        tree = {"embedding": params(scanned=True)["embedding"]}
        adapted = as_if_trained(lora_jax.wrap(tree, "embedding", rank=2, alpha=3))
        rule = Rule("token_embd.weight", "embedding", kind="embedding", tied="output.weight")
        fields, tensors = read(save(tmp_path / "a.gguf", adapted, names=[rule]))
        table = np.asarray(tree["embedding"])
        both = {"token_embd.weight": table, "output.weight": table}
        expected = np.asarray(lora_jax.merge(adapted)["embedding"])
        for found in applied(both, fields, tensors).values():
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())

    def test_experts(self, tmp_path):
        """Each has factors of its own, in one tensor of three axes."""
        experts, axes = 4, ("batch", "batch", "in", "out")
        tree = {"up": jnp.ones((LAYERS, experts, WIDTH, HIDDEN))}
        adapted = as_if_trained(lora_jax.wrap(tree, "up", rank=2, alpha=2, axes={"up": axes}))
        names = [Rule("blk.{n}.ffn_up_exps.weight", "up", kind="parameter", axes=axes)]
        _, tensors = read(save(tmp_path / "a.gguf", adapted, names=names))
        change = np.asarray(lora_jax.merge(adapted)["up"]) - 1
        for n in range(LAYERS):
            A = tensors[f"blk.{n}.ffn_up_exps.weight.lora_a"]
            B = tensors[f"blk.{n}.ffn_up_exps.weight.lora_b"]
            assert (A.shape, B.shape) == ((experts, 2, WIDTH), (experts, HIDDEN, 2))
            np.testing.assert_allclose(B @ A, change[n].swapaxes(1, 2), rtol=0, atol=1e-5)

    def test_the_rules_of_place(self, tmp_path):
        """What puts a model's file into a tree writes the adapter for the same file."""
        names = rules(scanned=True)
        own = weights(params(scanned=True), permutes=False)
        model = write(tmp_path / "model.gguf", {k: np.ascontiguousarray(v) for k, v in own.items()})
        shapes = jax.eval_shape(lambda: params(scanned=True))
        placed = lora_jax.exchange.place(exchange.load(model), shapes, names=names)
        axes = {f"layers/{path}": ("batch", *each) for path, each in AXES.items()}
        tree = as_if_trained(lora_jax.wrap(placed, TARGETS, rank=2, axes=axes))
        path = save(tmp_path / "a.gguf", tree, names=names, permuted=False)
        assert_applies(path, tree, permutes=False)


class TestScales:
    def alpha(self, tmp_path, tree):
        fields, _ = assert_applies(save(tmp_path / "a.gguf", tree), tree)
        return fields["adapter.lora.alpha"]

    def test_other_ranks_of_one_alpha(self, tmp_path):
        tree = wrapped({"attention": {"rank": 3}, "mlp": {"rank": 5}}, alpha=0.1)
        assert self.alpha(tmp_path, tree) == pytest.approx(0.1)

    def test_other_alphas_of_one_rank(self, tmp_path):
        tree = wrapped({"attention": {"alpha": 3}, "mlp": {"alpha": 7}})
        assert self.alpha(tmp_path, tree) == 0

    def test_rslora(self, tmp_path):
        assert self.alpha(tmp_path, wrapped(rslora=True)) == pytest.approx(3 * 2**0.5)

    def test_rslora_of_other_ranks(self, tmp_path):
        tree = wrapped({"attention": {"rank": 3}, "mlp": {"rank": 5}}, rslora=True)
        assert self.alpha(tmp_path, tree) == 0

    def test_pissa_beside_another(self, tmp_path):
        tree = wrapped({"attention": {"init": "pissa"}, "mlp": {"init": "kaiming"}})
        fields, tensors = read(save(tmp_path / "a.gguf", tree))
        found = applied(weights(params(scanned=True)), fields, tensors)
        for name, expected in weights(lora_jax.merge(tree)).items():
            error = np.linalg.norm(found[name] - expected) / np.linalg.norm(expected)
            assert error < 1e-5, name

    @pytest.mark.parametrize("scale", [0.0, 1e-44, 1 / 3, 2.5e-7, 3e38, -2.0])
    def test_any_scale(self, tmp_path, scale):
        """An alpha of 0 says that the scale is 1, which it must not where the scale is 0."""
        tree = lora_jax.wrap({"up": jnp.ones((4, 4))}, "up", rank=3)
        factors = {"lora_A": jnp.full((4, 3), 2.0**-8), "lora_B": jnp.full((3, 4), 0.25)}
        node = dataclasses.replace(tree["up"], scale=jnp.float32(scale), **factors)
        names = [Rule("blk.0.ffn_up.weight", "up")]
        fields, tensors = read(save(tmp_path / "a.gguf", {"up": node}, names=names))
        zero = {"blk.0.ffn_up.weight": np.zeros((4, 4), np.float32)}
        found = applied(zero, fields, tensors)["blk.0.ffn_up.weight"]
        expected = float(np.float32(scale)) * 3 * 2.0**-10
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-44)


class TestPaths:
    def test_an_adapter_is_replaced_where_that_is_said(self, tmp_path):
        path = save(tmp_path / "a.gguf", wrapped("mlp"))
        before = contents(tmp_path)
        with pytest.raises(CheckpointError, match=r"holds an adapter; .*overwrite=True"):
            save(path, wrapped())
        assert contents(tmp_path) == before
        tree = wrapped()
        assert_applies(save(path, tree, overwrite=True), tree)

    @pytest.mark.parametrize("overwrite", [True, False])
    @pytest.mark.parametrize("content", ["text", "a model", "half an adapter", "nothing"])
    def test_what_is_not_an_adapter_stays(self, tmp_path, content, overwrite):
        path = tmp_path / "a.gguf"
        if content == "a model":
            write(path, {"w": np.ones((2, 3), np.float32)})
        elif content == "half an adapter":
            path.write_bytes(save(tmp_path / "b.gguf", wrapped("mlp")).read_bytes()[:50])
        else:
            path.write_text("" if content == "nothing" else content)
        before = contents(tmp_path)
        with pytest.raises(CheckpointError, match="not an adapter in GGUF; choose another"):
            save(path, wrapped("mlp"), overwrite=overwrite)
        assert contents(tmp_path) == before

    @pytest.mark.parametrize("overwrite", [True, False])
    def test_a_folder(self, tmp_path, overwrite):
        (tmp_path / "folder").mkdir()
        for folder in (tmp_path, tmp_path / "folder"):
            with pytest.raises(CheckpointError, match=r"is a folder; .*adapter\.gguf"):
                save(folder, wrapped("mlp"), overwrite=overwrite)
        assert contents(tmp_path) == {}

    def test_parents_are_made(self, tmp_path):
        assert save(tmp_path / "some" / "where" / "a.gguf", wrapped("mlp")).is_file()

    @pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
    @pytest.mark.parametrize("step", ["header", "kv_data", "tensors", "in place"])
    @pytest.mark.parametrize("there", [True, False])
    def test_an_interrupted_save(self, tmp_path, monkeypatch, step, failure, there):
        path = tmp_path / "a.gguf"
        if there:
            save(path, wrapped("mlp/up"))
        before = contents(tmp_path)

        def fail(*args):
            raise failure

        if step == "in place":
            monkeypatch.setattr(_folders, "_put_file_in_place", fail)
        else:
            monkeypatch.setattr(gguf.GGUFWriter, f"write_{step}_to_file", fail)
        with pytest.raises((CheckpointError, KeyboardInterrupt)):
            save(path, wrapped("mlp"), overwrite=True)
        assert contents(tmp_path) == before
        assert [file for file in tmp_path.iterdir() if file != path] == []

    def test_a_killed_save(self, tmp_path, monkeypatch):
        """What is left of it has a name of its own, and goes with the next one."""
        path = save(tmp_path / "a.gguf", wrapped("mlp/up"))
        before = path.read_bytes()
        with monkeypatch.context() as patched:
            patched.setattr(_folders.shutil, "rmtree", lambda *args, **kwargs: None)
            patched.setattr(gguf.GGUFWriter, "write_tensors_to_file", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                save(path, wrapped("mlp"), overwrite=True)
        assert path.read_bytes() == before
        left = [file.name for file in tmp_path.iterdir() if file != path]
        assert [re.sub("[0-9a-f]{8}", "*", name) for name in left] == [".a.gguf.*.unfinished"]
        save(path, wrapped("mlp"), overwrite=True)
        assert list(tmp_path.iterdir()) == [path]

    def test_the_package_is_named_where_it_is_missing(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "gguf", None)
        with pytest.raises(ImportError, match=r"pip install 'lora-jax\[gguf\]'"):
            save(tmp_path / "a.gguf", wrapped("mlp"))


def _interrupt(*args):
    raise KeyboardInterrupt
