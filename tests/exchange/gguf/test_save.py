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

from tests.exchange.gguf.files import write  # noqa: E402

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


def rules_without():
    """Returns the rules without that of the keys."""
    return [rule for rule in rules(scanned=True) if "attn_k" not in rule.name]
