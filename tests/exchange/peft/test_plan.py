"""Tensors that do not fit: each error names the tensor and the leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.exchange.peft import Rule, load
from tests.exchange.peft.files import (
    KERNEL_A,
    KERNEL_B,
    NAMES,
    TENSORS,
    numbers,
    params,
    refused,
    wrapped,
    write_adapter,
)


class TestTensors:
    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"a.k.lora_A.weight": numbers(2, 3)}, "'.*a.k.lora_A.weight' of shape .* no place"),
            (
                {"a.k.weight": numbers(2, 3)},
                "no place.*'a.k.weight'.*nearest names are 'a.q.weight",
            ),
            ({"../../a.weight": numbers(2)}, "'.*/a.weight' of shape .* has no place"),
            ({KERNEL_B: None}, "'a.q.weight' has '.*lora_A.*expected 'lora_A', 'lora_B'"),
            ({"a.q.lora_magnitude_vector": numbers(4)}, "`use_dora` False"),
            (
                {"a.q.lora_B.bias": numbers(4)},
                "lora_B.bias' is not a tensor that lora_jax supports",
            ),
            ({"a.q.lora_diag": numbers(2)}, "lora_diag' is not a tensor that lora_jax supports"),
            ({KERNEL_A: numbers(2, 5)}, r"has shape \(2, 5\); expected \(2, 3\) at rank 2"),
            ({KERNEL_B: numbers(4, 3)}, r"has shape \(4, 3\); expected \(4, 2\) at rank 2"),
            ({KERNEL_A: np.float32(1)}, r"has shape \(\); expected \(0, 3\)"),
            ({KERNEL_A: numbers(2, 3, 1)}, r"has shape \(2, 3, 1\); expected \(2, 3\)"),
            ({"a.q.bias": numbers(5)}, r"a.q.bias' has shape \(5,\); expected \(4,\)"),
            ({"a.q.weight": numbers(4, 3)}, "'a/q/kernel' is adapted and trained in full"),
        ],
    )
    def test_what_does_not_fit(self, tmp_path, change, match):
        tensors = {key: value for key, value in {**TENSORS, **change}.items() if value is not None}
        refused(write_adapter(tmp_path / "adapter", tensors), match)

    def test_all_problems_at_once(self, tmp_path):
        tensors = {f"b.{n}.weight": numbers(2) for n in range(7)}
        folder = write_adapter(tmp_path / "adapter", tensors)
        refused(folder, r"(?s)'b.0.weight'.*'b.4.weight'.*and 2 more")

    def test_no_tensors_at_all(self, tmp_path):
        refused(write_adapter(tmp_path / "adapter", {}), "holds no tensors")

    def test_a_missing_magnitude(self, tmp_path):
        folder = write_adapter(tmp_path / "adapter", TENSORS, use_dora=True)
        refused(folder, "expected 'lora_A', 'lora_B', 'magnitude'.*`use_dora` True")

    def test_an_embedding_that_is_none(self, tmp_path):
        tensors = {"e.lora_embedding_A": numbers(2, 5), "e.lora_embedding_B": numbers(3, 2)}
        folder = write_adapter(tmp_path / "adapter", tensors)
        names = [Rule("e.weight", "e")]
        refused(
            folder,
            r"adapts an Embedding.*Rule\('e.weight', 'e', kind='embedding'\)",
            {"e": jnp.ones((5, 3))},
            names,
        )

    def test_a_linear_that_is_an_embedding(self, adapter):
        names = [Rule("a.q.weight", "a/q/kernel", kind="embedding")]
        refused(adapter, r"adapts an? Linear.*kind='linear'\)", names=names)

    def test_an_array(self, adapter):
        names = [Rule("a.q.weight", "a/q/kernel", kind="array")]
        refused(adapter, "kind 'array'; expected an 'in' and an 'out' axis", names=names)

    def test_a_convolution_with_groups(self, tmp_path):
        """PEFT's adapter reads the channels of all groups."""
        tensors = {"c.lora_A.weight": numbers(2, 6, 3), "c.lora_B.weight": numbers(4, 1, 1)}
        folder = write_adapter(tmp_path / "adapter", tensors)
        rule = Rule("c.weight", "c", kind="conv", axes=("in", "in", "out"))
        refused(
            folder, "convolution with groups.*does not support", {"c": jnp.ones((3, 3, 4))}, [rule]
        )

    def test_two_values_of_one_weight(self, tmp_path):
        tensors = {**TENSORS, "a.q.base_layer.bias": numbers(4), "a.q.bias": numbers(4, start=1)}
        folder = write_adapter(tmp_path / "adapter", tensors)
        refused(folder, "'.*base_layer.bias' and '.*a.q.bias' are two values of 'a.q.bias'")

    @pytest.mark.parametrize(("value", "dtype"), [(1 / 3, jnp.bfloat16), (1e30, jnp.float16)])
    def test_a_weight_that_the_dtype_of_the_params_cannot_hold(self, tmp_path, value, dtype):
        folder = write_adapter(tmp_path / "x", {**TENSORS, "a.q.bias": numbers(4) + value})
        tree = params()
        tree["a"]["q"]["bias"] = jnp.ones(4, dtype)
        refused(folder, r"trained in full as float32.*has .*float16.*astype\('float32'\)", tree)

    def test_a_weight_that_the_dtype_of_the_params_can_hold(self, tmp_path):
        tensors = {**TENSORS, "a.q.bias": numbers(4).astype(np.float16)}
        loaded = load(write_adapter(tmp_path / "x", tensors), params(), names=NAMES)
        assert loaded["a"]["q"]["bias"].value.dtype == jnp.float32

    def test_wrapped_params(self, adapter):
        refused(adapter, r"wrapped already at 'a/q/kernel'.*unwrap\(params\)", wrapped())

    def test_params_are_left_alone(self, tmp_path):
        folder = write_adapter(tmp_path / "x", {**TENSORS, "a.q.bias": numbers(5)})
        tree = params()
        before = jax.tree.map(np.array, tree)
        refused(folder, "expected", tree)
        jax.tree.map(np.testing.assert_array_equal, tree, before)


class TestStacks:
    tree = {"q": jnp.ones((3, 3, 4))}  # noqa: RUF012
    names = (Rule("{n}.q.weight", "q"),)

    def stack(self, tmp_path, layers=(0, 1, 2), ranks=(2, 2, 2), **config):
        tensors = {}
        for layer in layers:
            tensors[f"{layer}.q.lora_A.weight"] = numbers(ranks[layer], 3)
            tensors[f"{layer}.q.lora_B.weight"] = numbers(4, ranks[layer])
        return write_adapter(tmp_path / "adapter", tensors, **config)

    def test_a_layer_too_many(self, tmp_path):
        refused(self.stack(tmp_path, (0, 3), (2,) * 4), "'3.q.weight'", self.tree, self.names)

    def test_ranks_that_differ(self, tmp_path):
        folder = self.stack(tmp_path, ranks=(2, 3, 2), rank_pattern={"1.q": 3})
        refused(
            folder,
            "a stack, which has one rank, and '0.q.weight' and '1.q.weight' differ in it: 2 and 3",
            self.tree,
            self.names,
        )

    def test_scales_that_differ(self, tmp_path):
        folder = self.stack(tmp_path, alpha_pattern={"2.q": 1})
        refused(folder, "one scale.*'2.q.weight' differ in it: 2.0 and 0.5", self.tree, self.names)

    def test_dtypes_that_differ(self, tmp_path):
        tensors = {
            f"{n}.q.lora_{x}.weight": numbers(4, 4)[:2].T.astype(d)
            if x == "B"
            else numbers(2, 3).astype(d)
            for n, d in enumerate([np.float32, np.float16])
            for x in "AB"
        }
        folder = write_adapter(tmp_path / "x", tensors)
        refused(folder, "one dtype", self.tree, self.names)

    def test_a_hole_in_a_stack_of_stacks(self, tmp_path):
        names = [Rule("{n}.{e}.weight", "q", axes=("batch", "batch", "in", "out"))]
        tensors = {f"0.{e}.lora_{x}.weight": numbers(2, 2) for e in (0, 2) for x in "AB"}
        folder = write_adapter(tmp_path / "adapter", tensors)
        refused(folder, "does not adapt '0.1.weight'", {"q": jnp.ones((2, 3, 2, 2))}, names)
