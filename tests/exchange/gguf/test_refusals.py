"""What a LoRA file of GGUF can't say is refused by name."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import CheckpointError
from lora_jax.exchange.peft import Rule
from tests.folders import contents

gguf = pytest.importorskip("gguf")

from tests.exchange.gguf.adapted import (  # noqa: E402
    VOCABULARY,
    WIDTH,
    params,
    rules,
    rules_without,
    save,
    wrapped,
)


class TestRefusals:
    def refused(self, path, match, tree, error=CheckpointError, **options):
        before = contents(path.parent)
        with pytest.raises(error, match=match):
            save(path, tree, **options)
        assert contents(path.parent) == before

    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "adapter.gguf"

    def test_a_tree_without_adapters(self, path):
        self.refused(path, "has no adapters", params(scanned=True))

    def test_half_a_tree(self, path):
        adapters, _ = lora_jax.split(wrapped())
        self.refused(path, "combine", adapters)

    def test_a_node_without_a_rule(self, path):
        self.refused(path, "no rule for 'layers/attention/key'", wrapped(), names=rules_without())

    def test_weights_trained_in_full(self, path):
        tree = wrapped(train="head")
        self.refused(path, r"trains 'head' in full.*merge\(wrapped\)", tree)

    def test_magnitudes(self, path):
        tree = wrapped("mlp", dora=True)
        self.refused(path, r"magnitudes \(DoRA\) at 'layers/mlp/gate'.*dora=False", tree)

    def test_several_adapters(self, path):
        bank = lora_jax.serving.bank([wrapped(), wrapped()])
        self.refused(path, "several adapters.*serving.select", bank)
        save(path, lora_jax.serving.select(bank, 1))

    def test_an_adapter_on_another(self, path):
        tree = wrapped("mlp/up")
        up = tree["layers"]["mlp"]["up"]
        tree["layers"]["mlp"]["up"] = dataclasses.replace(up, base=up)
        self.refused(path, "an adapter on another one at 'layers/mlp/up'", tree)

    def test_convolutions(self, path):
        kernel = {"kernel": jnp.ones((3, 4, 5))}
        axes = ("in", "in", "out")
        tree = lora_jax.wrap(kernel, "kernel", rank=2, axes={"kernel": axes})
        names = [Rule("blk.0.ffn_up.weight", "kernel", kind="conv", axes=axes)]
        self.refused(path, "has the kind 'conv'; llama.cpp adapts matrices", tree, names=names)

    def test_transposed_weights(self, path):
        tree = lora_jax.wrap({"up": jnp.ones((4, 5))}, "up", rank=2)
        names = [Rule("blk.0.ffn_up.weight", "up", transposed=True)]
        self.refused(path, "is transposed; llama.cpp", tree, names=names)

    def test_names_of_pytorch(self, path):
        tree = lora_jax.wrap({"up": jnp.ones((4, 5))}, "up", rank=2)
        names = [Rule("model.layers.0.mlp.up_proj.weight", "up")]
        self.refused(path, r"no tensor of the architecture 'llama'.*the nearest", tree, names=names)

    def test_a_tensor_of_another_architecture(self, path):
        tree = lora_jax.wrap({"up": jnp.ones((4, 5))}, "up", rank=2)
        names = [Rule("blk.0.attn_qkv.weight", "up")]
        match = r"no tensor of the architecture 'llama'.*'blk\.\{n\}\.attn_k\.weight'"
        self.refused(path, match, tree, names=names)

    def test_no_architecture(self, path):
        match = r"`architecture` is 'mistral'; expected `general\.architecture`.*'llama'"
        self.refused(path, match, wrapped(), ValueError, architecture="mistral")

    def test_rows_that_are_not_known(self, path):
        match = "`permuted` is None, and for the architecture 'granite' it is not known"
        self.refused(path, match, wrapped(), ValueError, architecture="granite")
        # Of other tensors than queries and keys it need not be.
        save(path, wrapped("mlp"), architecture="granite")

    def test_heads_that_are_not_known(self, path):
        tree = lora_jax.wrap({"query": jnp.ones((4, 12))}, "query", rank=2)
        names = [Rule("blk.0.attn_q.weight", "query")]
        match = r"`head_dim` is None, and 'query' of shape \(4, 12\).*save\(\.\.\., head_dim=64\)"
        self.refused(path, match, tree, ValueError, names=names)
        for dim in (0, 1, 3, 5, 8, -2):
            match = f"`head_dim` is {dim} .*even number that divides its 12 outputs"
            self.refused(path, match, tree, ValueError, names=names, head_dim=dim)

    def test_heads_that_are_others(self, path):
        match = "`head_dim` is 8, and 'layers/attention/query'.* has heads of 6"
        self.refused(path, match, wrapped(), ValueError, head_dim=8)

    @pytest.mark.parametrize("tied", [True, False])
    def test_an_embedding_that_is_the_output_layer(self, path, tied):
        table = {"embedding": jnp.ones((VOCABULARY, WIDTH))}
        tree = lora_jax.wrap(table, "embedding", rank=2)
        names = [Rule("token_embd.weight", "embedding", kind="embedding", tied=tied)]
        match = "adapter of an embedding that is the output layer too.*Leave it out"
        self.refused(path, match, tree, names=names)

    def test_a_lookup_of_another_kind(self, path):
        names = [
            dataclasses.replace(rule, kind="linear") if rule.path == "embedding" else rule
            for rule in rules(scanned=True)
        ]
        match = "'token_embd.weight'.* the kind 'linear'; expected .*kind='embedding'"
        self.refused(path, match, wrapped("embedding"), names=names)

    def test_a_matrix_of_the_kind_of_a_lookup(self, path):
        tree = lora_jax.wrap({"up": jnp.ones((4, 5))}, "up", rank=2)
        names = [Rule("blk.0.ffn_up.weight", "up", kind="embedding")]
        self.refused(path, "kind 'embedding'; expected .*kind='linear'", tree, names=names)

    def test_experts_that_are_one_matrix(self, path):
        tree = lora_jax.wrap({"up": jnp.ones((4, 5))}, "up", rank=2)
        names = [Rule("blk.0.ffn_up_exps.weight", "up")]
        match = r"'up' with the axes \('in', 'out'\), one matrix, .*which is a stack of experts"
        self.refused(path, match, tree, names=names)

    def test_one_matrix_that_is_experts(self, path):
        axes = ("batch", "in", "out")
        tree = lora_jax.wrap({"up": jnp.ones((3, 4, 5))}, "up", rank=2, axes={"up": axes})
        names = [Rule("blk.0.ffn_up.weight", "up", kind="parameter", axes=axes)]
        self.refused(path, "a stack of matrices, the name .*which is one matrix", tree, names=names)

    def test_some_experts(self, path):
        axes = {"up": ("batch", "in", "out")}
        tree = lora_jax.wrap({"up": jnp.ones((3, 4, 5))}, "up", rank=2, axes=axes, layers=(1,))
        names = [Rule("blk.0.ffn_up_exps.weight", "up", kind="parameter", axes=axes["up"])]
        self.refused(path, "adapts all experts of a parameter or none", tree, names=names)

    def test_a_stack_that_no_field_numbers(self, path):
        axes = {"up": ("batch", "in", "out")}
        tree = lora_jax.wrap({"up": jnp.ones((3, 4, 5))}, "up", rank=2, axes=axes)
        names = [Rule("blk.0.ffn_up.weight", "up")]
        self.refused(path, "of which 1 are 'batch'; expected 0", tree, names=names)

    def test_two_leaves_of_one_name(self, path):
        tree = lora_jax.wrap({"a": jnp.ones((4, 5)), "b": jnp.ones((4, 5))}, "a|b", rank=2)
        names = [Rule("blk.0.ffn_up.weight", "a"), Rule("blk.0.ffn_up.weight", "b")]
        self.refused(path, "the same PyTorch name", tree, ValueError, names=names)

    @pytest.mark.parametrize("number", [np.nan, np.inf])
    def test_values_that_are_not_finite(self, path, number):
        tree = wrapped("mlp/up")
        up = tree["layers"]["mlp"]["up"]
        tree["layers"]["mlp"]["up"] = dataclasses.replace(
            up, lora_B=up.lora_B.at[1, 0, 0].set(number)
        )
        self.refused(path, "in 'blk.1.ffn_up.weight.lora_b' that are not finite", tree)
        tree["layers"]["mlp"]["up"] = dataclasses.replace(up, scale=jnp.float32(number))
        self.refused(path, f"scale {number} at 'layers/mlp/up'", tree)

    def test_values_that_float32_does_not_hold(self, path):
        """A scale that has to go into lora_b may take it out of range."""
        tree = wrapped({"mlp/up": {"alpha": 1e38}, "mlp/down": {"alpha": 1}}, rank=1)
        up = tree["layers"]["mlp"]["up"]
        tree["layers"]["mlp"]["up"] = dataclasses.replace(up, lora_B=up.lora_B.at[1, 0, 0].set(99))
        self.refused(path, "in 'blk.1.ffn_up.weight.lora_b' that are not finite", tree)
