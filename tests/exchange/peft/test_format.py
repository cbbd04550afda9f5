"""Round trips through the format, and files made by hand; without PyTorch."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax
from lora_jax import CheckpointError
from lora_jax import init as lora_init
from lora_jax.exchange.peft import Rule, load, read_config, save
from tests.agreement import assert_agree
from tests.exchange.peft.models import LAYERS, MODELS, WIDTH
from tests.trained import as_if_trained

PREFIX = "base_model.model."


def assert_identical(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        assert np.asarray(got).tobytes() == np.asarray(wanted).tobytes()


def tensors_of(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


def write_adapter(folder, tensors, **config):
    """Writes an adapter by hand."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    named = {f"{PREFIX}{key}": np.asarray(tensor, order="C") for key, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


def numbers(*shape, start=0):
    return np.arange(start, start + np.prod(shape), dtype=np.float32).reshape(shape)


def random_factors(key, weight2d, rank, scale):
    """Initialises both factors at random, and leaves the base alone."""
    inputs, outputs = weight2d.shape
    keys = jax.random.split(key)
    lora_A, lora_B = (
        jax.random.normal(one, shape)
        for one, shape in zip(keys, ((inputs, rank), (rank, outputs)), strict=True)
    )
    return weight2d, lora_A, lora_B


# The versions that a config may name, and as which the untold ones write in the tests.
UNTOLD = {None: "0.17.1", "0.18.1.dev0@1a2b3c": "0.18.0", "0.19.1.dev0": "0.19.0"}
VERSIONS = [*UNTOLD, "0.18.1", "0.19.0", "0.19.1", "0.21.2"]


def change_by_peft(version, shape, *, is_transposed):
    """Returns the change of a parameter, and A and B, as `ParamWrapper` of a version has them."""
    release = tuple(map(int, UNTOLD.get(version, version).split(".")))
    experts, first, last = (1, *shape) if len(shape) == 2 else shape
    has_experts = experts > 1
    A_is_last = not has_experts
    if has_experts and release >= (0, 19, 1):
        A_is_last = not is_transposed
    elif has_experts and release >= (0, 19, 0):
        A_is_last = is_transposed
    sizes = (last, first) if A_is_last else (first, last)
    A, B = numbers(2 * experts, sizes[0]), numbers(sizes[1], 2 * experts, start=10)
    each_A, each_B = A.reshape(experts, 2, -1), B.reshape(-1, 2, experts)
    equation = "bre,era->eba" if A_is_last else "bre,era->eab"
    change = 2 * np.einsum(equation, each_B, each_A)
    tensors = {"m.experts.lora_A.weight": A, "m.experts.lora_B.weight": B}
    return change.reshape(shape), tensors


VARIANTS = {
    "plain": {},
    "rslora": {"rslora": True, "alpha": 3},
    "dora": {"dora": True},
    "bfloat16": {"dtype": jnp.bfloat16},
    "float16": {"dtype": jnp.float16},
    "alpha_of_many_digits": {"alpha": 1 / 3, "rank": 3},
}
ROUND_TRIPS = [
    *(("stacked", variant) for variant in VARIANTS),
    *((name, "plain") for name in MODELS if name != "stacked"),
    *((name, "dora") for name in MODELS if name != "stacked" and not name.startswith("experts")),
]


class TestRoundTrip:
    @pytest.mark.parametrize(("name", "variant"), ROUND_TRIPS)
    def test_every_model_and_variant(self, name, variant, tmp_path):
        model = MODELS[name]
        settings = {"rank": 2, "init": random_factors, **VARIANTS[variant]}
        wrapped = lora_jax.wrap(model.params(), model.targets, axes=model.axes or None, **settings)
        save(tmp_path / "adapter", wrapped, names=model.names)
        loaded = load(tmp_path / "adapter", model.params(), names=model.names)
        assert_identical(loaded, wrapped)

    @pytest.mark.parametrize("name", ["layered", "stacked"])
    @pytest.mark.parametrize(
        "train", ["classifier", "query/bias", "norm", ["norm", "query/bias", "output/bias"]]
    )
    def test_weights_trained_in_full(self, name, train, tmp_path):
        model = MODELS[name]
        wrapped = as_if_trained(
            lora_jax.wrap(model.params(), "query/kernel", rank=2, axes=model.axes, train=train)
        )
        save(tmp_path / "adapter", wrapped, names=model.names)
        loaded = load(tmp_path / "adapter", model.params(), names=model.names)
        assert_identical(loaded, wrapped)

    @pytest.mark.parametrize("layers", [(0, 2), (1,)])
    def test_some_layers_of_a_stack(self, layers, tmp_path):
        model = MODELS["stacked"]
        wrapped = lora_jax.wrap(
            model.params(), ("query", "dense"), rank=2, axes=model.axes, layers=layers, dora=True
        )
        save(tmp_path / "adapter", wrapped, names=model.names)
        names = {key.split(".")[1] for key in tensors_of(tmp_path / "adapter")}
        assert names == {str(layer) for layer in layers}
        loaded = load(tmp_path / "adapter", model.params(), names=model.names)
        assert_identical(loaded, wrapped)

    def test_one_tree_read_as_another(self, tmp_path):
        layered, stacked = MODELS["layered"], MODELS["stacked"]
        wrapped = as_if_trained(
            lora_jax.wrap(
                layered.params(), layered.targets, rank=2, axes=layered.axes, train="norm"
            )
        )
        save(tmp_path / "layers", wrapped, names=layered.names)
        restacked = load(tmp_path / "layers", stacked.params(), names=stacked.names)
        save(tmp_path / "stack", restacked, names=stacked.names)
        assert_identical(tensors_of(tmp_path / "stack"), tensors_of(tmp_path / "layers"))
        back = load(tmp_path / "stack", layered.params(), names=layered.names)
        assert_identical(back, wrapped)

    def test_a_stack_of_stacks(self, tmp_path):
        params = {"kernel": jnp.asarray(numbers(2, 3, 4, 5))}
        axes = ("batch", "in", "batch", "out")
        names = [Rule("layer.{n}.expert.{e}.w.weight", "kernel", axes=axes)]
        wrapped = lora_jax.wrap(
            params, "kernel", rank=2, axes={"kernel": axes}, init=random_factors, layers=(1,)
        )
        save(tmp_path / "adapter", wrapped, names=names)
        assert tensors_of(tmp_path / "adapter").keys() == {
            f"layer.1.expert.{e}.w.lora_{x}.weight" for e in range(4) for x in "AB"
        }
        assert_identical(load(tmp_path / "adapter", params, names=names), wrapped)

    def test_experts_in_a_stack_of_layers(self, tmp_path):
        params = {"up": jnp.asarray(numbers(3, 2, 4, 5))}
        axes = ("batch", "batch", "in", "out")
        names = [Rule("layer.{n}.experts.up", "up", kind="parameter", axes=axes)]
        wrapped = lora_jax.wrap(
            params, "up", rank=2, axes={"up": axes}, init=random_factors, layers=(0, 2)
        )
        save(tmp_path / "adapter", wrapped, names=names)
        assert_identical(load(tmp_path / "adapter", params, names=names), wrapped)

    def test_axes_given_beside_the_rules(self, tmp_path):
        params = {"query": {"kernel": jnp.asarray(numbers(4, 3, 2))}}
        names = [Rule("query.weight", "query/kernel")]
        axes = lora_jax.infer_axes(
            lambda params, x: jnp.einsum("bi,iho->bho", x, params["query"]["kernel"]),
            params,
            jnp.ones((1, 4)),
        )
        wrapped = lora_jax.wrap(params, "query", rank=2, axes=axes)
        save(tmp_path / "adapter", wrapped, names=names)
        assert tensors_of(tmp_path / "adapter")["query.lora_B.weight"].shape == (6, 2)
        for given in (axes, {"query": ("in", "out", "out")}):
            loaded = load(tmp_path / "adapter", params, names=names, axes=given)
            assert_identical(loaded, wrapped)

    @pytest.mark.wrong_types
    def test_frozen_factors_are_chosen_anew(self, tmp_path):
        params = {"query": jnp.asarray(numbers(4, 3))}
        names = [Rule("query.weight", "query")]
        wrapped = lora_jax.wrap(params, "query", rank=2, freeze="lora_A")
        save(tmp_path / "adapter", wrapped, names=names)
        assert load(tmp_path / "adapter", params, names=names)["query"].frozen == ()
        loaded = load(tmp_path / "adapter", params, names=names, freeze="lora_A")
        assert_identical(loaded, wrapped)
        with pytest.raises(ValueError, match="`freeze` is 'B'; expected one of 'lora_A'"):
            load(tmp_path / "adapter", params, names=names, freeze="B")
        with pytest.raises(TypeError, match=r"`peft_version` is 0\.18; expected text"):
            load(tmp_path / "adapter", params, names=names, peft_version=0.18)

    def test_a_base_that_an_initialiser_changed(self, tmp_path):
        def half_taken_out(key, weight2d, rank, scale):
            _, lora_A, lora_B = random_factors(key, weight2d, rank, scale)
            return weight2d - scale * lora_A @ lora_B, lora_A, lora_init.Frozen(lora_B)

        params = {"query": jnp.asarray(numbers(6, 5)) / 30}
        names = [Rule("query.weight", "query")]
        wrapped = as_if_trained(
            lora_jax.wrap(params, "query", rank=2, alpha=3, init=half_taken_out)
        )
        save(tmp_path / "adapter", wrapped, names=names)
        loaded = load(tmp_path / "adapter", params, names=names)
        assert loaded["query"].rank == 4
        assert_agree(lora_jax.merge(loaded)["query"], lora_jax.merge(wrapped)["query"])

    @pytest.mark.usefixtures("float64")
    def test_float64(self, tmp_path):
        params = {"query": jnp.asarray(numbers(4, 3), jnp.float64)}
        names = [Rule("query.weight", "query")]
        wrapped = lora_jax.wrap(params, "query", rank=3, alpha=1, init=random_factors)
        save(tmp_path / "adapter", wrapped, names=names)
        assert_identical(load(tmp_path / "adapter", params, names=names), wrapped)

    def test_the_file_is_copied(self, tmp_path):
        params = {"query": jnp.asarray(numbers(4, 3))}
        names = [Rule("query.weight", "query")]
        save(tmp_path / "adapter", lora_jax.wrap(params, "query", rank=2), names=names)
        loaded = load(tmp_path / "adapter", params, names=names)
        before = np.array(loaded["query"].lora_A)
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        with file.open("r+b") as opened:
            opened.seek(file.stat().st_size // 2)
            opened.write(b"\xff" * 8)
        assert np.array_equal(loaded["query"].lora_A, before)


class TestByHand:
    """What a file means, number by number."""

    def test_linear(self, tmp_path):
        A, B = numbers(2, 3), numbers(4, 2, start=10)
        tensors = {"a.b.lora_A.weight": A, "a.b.lora_B.weight": B}
        folder = write_adapter(tmp_path / "adapter", tensors)
        params = {"b": jnp.zeros((3, 4))}
        loaded = load(folder, params, names=[Rule("a.b.weight", "b")])["b"]
        assert loaded.base is params["b"]
        assert np.array_equal(lora_jax.merge(loaded), 4 / 2 * (B @ A).T)
        assert (loaded.scale.dtype, float(loaded.scale)) == (jnp.float32, 2.0)

    def test_a_head_split(self, tmp_path):
        A, B = numbers(2, 3), numbers(4, 2, start=10)
        tensors = {"q.lora_A.weight": A, "q.lora_B.weight": B}
        folder = write_adapter(tmp_path / "adapter", tensors)
        rule = Rule("q.weight", "q", axes=("in", "out", "out"))
        loaded = load(folder, {"q": jnp.zeros((3, 2, 2))}, names=[rule])
        assert np.array_equal(lora_jax.merge(loaded)["q"], 2 * (B @ A).T.reshape(3, 2, 2))

    def test_embedding(self, tmp_path):
        A, B = numbers(2, 5), numbers(3, 2, start=10)
        tensors = {"e.lora_embedding_A": A, "e.lora_embedding_B": B}
        folder = write_adapter(tmp_path / "adapter", tensors)
        rule = Rule("e.weight", "e", kind="embedding")
        loaded = load(folder, {"e": jnp.zeros((5, 3))}, names=[rule])
        assert np.array_equal(lora_jax.merge(loaded)["e"], 2 * (B @ A).T)

    def test_convolution(self, tmp_path):
        A, B = numbers(2, 3, 5, 4), numbers(6, 2, 1, 1, start=10)
        tensors = {"c.lora_A.weight": A, "c.lora_B.weight": B}
        folder = write_adapter(tmp_path / "adapter", tensors)
        change = 2 * np.einsum("or,rihw->oihw", B[:, :, 0, 0], A)
        for axes, order in (
            (("in", "in", "in", "out"), (2, 3, 1, 0)),
            (("out", "in", "in", "in"), (0, 1, 2, 3)),
        ):
            kernel = jnp.zeros([change.shape[axis] for axis in order])
            rule = Rule("c.weight", "c", kind="conv", axes=axes)
            loaded = load(folder, {"c": kernel}, names=[rule])
            assert np.array_equal(lora_jax.merge(loaded)["c"], change.transpose(order))

    @pytest.mark.parametrize("transposed", [False, True])
    def test_experts(self, tmp_path, transposed):
        """A lists the experts one after another, B interleaves them."""
        A, B = numbers(3 * 2, 4), numbers(5, 2 * 3, start=10)
        tensors = {"m.experts.lora_A.weight": A, "m.experts.lora_B.weight": B}
        folder = write_adapter(tmp_path / "adapter", tensors, target_parameters=["experts.up"])
        rule = Rule(
            "m.experts.up",
            "up",
            kind="parameter",
            transposed=transposed,
            axes=("batch", "in", "out"),
        )
        loaded = load(folder, {"up": jnp.zeros((3, 4, 5))}, names=[rule])
        for expert in range(3):
            change = 2 * B[:, expert::3] @ A[2 * expert : 2 * expert + 2]
            assert np.array_equal(lora_jax.merge(loaded)["up"][expert], change.T)

    @pytest.mark.parametrize("version", VERSIONS)
    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("shape", [(4, 4), (4, 5), (1, 4, 4), (3, 4, 4), (3, 4, 5)])
    def test_parameters_of_every_version(self, tmp_path, version, transposed, shape):
        """The shape is that of the stored parameter, to which PEFT adds the change."""
        change, tensors = change_by_peft(version, shape, is_transposed=transposed)
        options = {"peft_version": version} if version else {}
        targets = {"target_parameters": ["m.experts.up"]}
        folder = write_adapter(tmp_path / "adapter", tensors, **targets, **options)
        axes = ("batch", "in", "out")[-len(shape) :]
        rule = Rule("m.experts.up", "up", kind="parameter", transposed=transposed, axes=axes)
        change = change if transposed else change.swapaxes(-1, -2)
        params = {"up": jnp.zeros(change.shape)}
        told = {}
        if version in UNTOLD and shape == (3, 4, 4) and not (transposed and not version):
            with pytest.raises(CheckpointError, match=r"square.*peft_version.*says which"):
                load(folder, params, names=[rule])
            told = {"peft_version": UNTOLD[version]}
        loaded = load(folder, params, names=[rule], **told)
        assert np.array_equal(lora_jax.merge(loaded)["up"], change)
        save(tmp_path / "back", loaded, names=[rule], config=read_config(folder))
        assert not read_config(tmp_path / "back")["peft_version"].startswith(("0.17", "0.18"))
        again = load(tmp_path / "back", params, names=[rule])
        assert np.array_equal(lora_jax.merge(again)["up"], change)

    def test_parameters_of_one_module(self, tmp_path):
        """PEFT wraps the module once for each, so the last one is the outermost."""
        tensors = {
            "x.base_layer.lora_A.weight": numbers(2, 3),
            "x.base_layer.lora_B.weight": numbers(3, 2),
            "x.lora_A.weight": numbers(2, 3, start=50),
            "x.lora_B.weight": numbers(3, 2, start=50),
        }
        targets = ["x.first", "x.second"]
        folder = write_adapter(tmp_path / "adapter", tensors, target_parameters=targets)
        names = [Rule("x.second", "a", kind="parameter"), Rule("x.first", "b", kind="parameter")]
        params = {"a": jnp.zeros((3, 3)), "b": jnp.zeros((3, 3))}
        loaded = load(folder, params, names=names)
        assert (loaded["a"].lora_A[0, 0], loaded["b"].lora_A[0, 0]) == (0, 50)
        loaded = load(folder, params, names=names[::-1])
        assert (loaded["a"].lora_A[0, 0], loaded["b"].lora_A[0, 0]) == (50, 0)

    def test_magnitudes(self, tmp_path):
        tensors = {
            "q.lora_A.weight": numbers(2, 3),
            "q.lora_B.weight": numbers(4, 2),
            "q.lora_magnitude_vector": numbers(4),
        }
        folder = write_adapter(tmp_path / "adapter", tensors, use_dora=True)
        rule = Rule("q.weight", "q", axes=("in", "out", "out"))
        loaded = load(folder, {"q": jnp.ones((3, 2, 2))}, names=[rule])["q"]
        assert np.array_equal(loaded.magnitude, [[0, 1], [2, 3]])
        assert np.array_equal(loaded.squared_norm, np.full((2, 2), 3))

    @pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
    def test_magnitudes_beside_a_column_of_zeros(self, tmp_path, dtype):
        """A feature that is zero stays zero; in half precision its norm has no inverse either."""
        generator = np.random.default_rng(0)
        A, B, kernel = (generator.normal(size=shape) for shape in ((2, 6), (5, 2), (6, 5)))
        B[1], kernel[:, 1] = 0, 0
        A, B, kernel = (array.astype(dtype) for array in (A, B, kernel))
        magnitude = np.array([0.5, 1, 2, 0.25, 1], dtype)
        tensors = {"lora_A.weight": A, "lora_B.weight": B, "lora_magnitude_vector": magnitude}
        named = {f"q.{name}": tensor for name, tensor in tensors.items()}
        folder = write_adapter(tmp_path / "adapter", named, use_dora=True)
        params = {"q": jnp.asarray(kernel)}
        loaded = load(folder, params, names=[Rule("q.weight", "q")])
        wide = [array.astype(np.float64) for array in (kernel, A, B, magnitude)]
        changed = wide[0] + 2 * (wide[2] @ wide[1]).T
        norms = np.linalg.norm(changed, axis=0)
        expected = changed * np.where(norms == 0, 0, wide[3] / np.where(norms == 0, 1, norms))
        tolerance = 4 * float(jnp.finfo(dtype).eps)
        assert_agree(lora_jax.merge(loaded)["q"], expected, tolerance=tolerance)
        apply = lora_jax.adapt(lambda params, x: x @ params["q"])
        assert_agree(apply(loaded, jnp.eye(6, dtype=dtype)), expected, tolerance=tolerance)

    @pytest.mark.parametrize(
        ("config", "scales"),
        [
            ({}, (2.0, 2.0)),
            ({"lora_alpha": 0.1}, (0.05, 0.05)),
            ({"use_rslora": True}, (4 / 2**0.5, 4 / 2**0.5)),
            ({"alpha_pattern": {"a": 1}}, (0.5, 2.0)),
            ({"alpha_pattern": {"x.a": 1, "b": 3}}, (0.5, 1.5)),
            ({"alpha_pattern": {r"^x\.a": 1, "^b": 3}}, (0.5, 2.0)),
            ({"alpha_pattern": {".*": 1, "a": 8}}, (0.5, 0.5)),
            ({"r": 8, "rank_pattern": {"a|b": 2}}, (2.0, 2.0)),
        ],
    )
    def test_scales(self, tmp_path, config, scales):
        tensors = {f"x.{name}.lora_{part}.weight": numbers(2, 2) for name in "ab" for part in "AB"}
        folder = write_adapter(tmp_path / "adapter", tensors, **config)
        params = {name: jnp.zeros((2, 2)) for name in "ab"}
        loaded = load(folder, params, names=[Rule("x.{n}.weight", "{n}")])
        assert (loaded["a"].scale, loaded["b"].scale) == tuple(map(np.float32, scales))

    def test_defaults_of_peft(self, tmp_path):
        tensors = {"a.lora_A.weight": numbers(8, 9), "a.lora_B.weight": numbers(9, 8)}
        folder = write_adapter(tmp_path / "adapter", tensors)
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        loaded = load(folder, {"a": jnp.zeros((9, 9))}, names=[Rule("a.weight", "a")])
        assert (loaded["a"].rank, float(loaded["a"].scale)) == (8, 1.0)

    def test_weights_trained_in_full(self, tmp_path):
        tensors = {
            "a.lora_A.weight": numbers(2, 3),
            "a.lora_B.weight": numbers(4, 2),
            "a.base_layer.bias": numbers(4),
            "head.weight": numbers(5, 4),
            "head.bias": numbers(5, start=7),
            "head.modules_to_save.bias": numbers(5, start=7),
            "head.original_module.bias": numbers(5, start=90),
        }
        folder = write_adapter(tmp_path / "adapter", tensors, modules_to_save=["head"], bias="all")
        params = {
            "a": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)},
            "head": {"kernel": jnp.zeros((4, 5)), "bias": jnp.zeros(5)},
        }
        names = [
            Rule("{module}.weight", "{module:.+}/kernel"),
            Rule("{module}.bias", "{module:.+}/bias"),
        ]
        loaded = load(folder, params, names=names)
        assert np.array_equal(loaded["a"]["bias"].value, numbers(4))
        assert np.array_equal(loaded["head"]["kernel"].value, numbers(5, 4).T)
        assert np.array_equal(loaded["head"]["bias"].value, numbers(5, start=7))
        assert loaded["head"]["bias"].base is params["head"]["bias"]

    def test_some_trained_layers_of_a_stack(self, tmp_path):
        tensors = {
            **{f"{n}.a.lora_{part}.weight": numbers(2, 2) for n in range(3) for part in "AB"},
            "1.a.base_layer.bias": numbers(2, start=5),
        }
        folder = write_adapter(tmp_path / "adapter", tensors, bias="lora_only")
        params = {"kernel": jnp.zeros((3, 2, 2)), "bias": jnp.ones((3, 2))}
        names = [Rule("{n}.a.weight", "kernel"), Rule("{n}.a.bias", "bias")]
        loaded = load(folder, params, names=names)
        assert np.array_equal(loaded["bias"].value, [[1, 1], [5, 6], [1, 1]])

    def test_a_copy_of_the_base_weight(self, tmp_path):
        """PEFT writes one for an embedding."""
        tensors = {
            "e.base_layer.weight": numbers(5, 3),
            "e.lora_embedding_A": numbers(2, 5),
            "e.lora_embedding_B": numbers(3, 2),
        }
        folder = write_adapter(tmp_path / "adapter", tensors)
        names = [Rule("e.weight", "e", kind="embedding")]
        loaded = load(folder, {"e": jnp.asarray(numbers(5, 3))}, names=names)
        assert loaded["e"].rank == 2
        with pytest.raises(lora_jax.CheckpointError, match="'e' in `params`.*vocabulary resized"):
            load(folder, {"e": jnp.zeros((5, 3))}, names=names)

    def test_keys_without_a_prefix(self, tmp_path):
        folder = write_adapter(tmp_path / "adapter", {})
        tensors = {"a.lora_A.weight": numbers(2, 3), "a.lora_B.weight": numbers(3, 2)}
        save_file(tensors, folder / "adapter_model.safetensors")
        loaded = load(folder, {"a": jnp.zeros((3, 3))}, names=[Rule("a.weight", "a")])
        assert loaded["a"].rank == 2

    def test_a_folder_of_links(self, tmp_path):
        """The cache of the Hugging Face hub is one."""
        tensors = {"a.lora_A.weight": numbers(2, 3), "a.lora_B.weight": numbers(3, 2)}
        original = write_adapter(tmp_path / "blobs", tensors)
        (tmp_path / "snapshot").mkdir()
        for file in original.iterdir():
            (tmp_path / "snapshot" / file.name).symlink_to(file)
        params = {"a": jnp.zeros((3, 3))}
        loaded = load(tmp_path / "snapshot", params, names=[Rule("a.weight", "a")])
        assert loaded["a"].rank == 2


class TestWrittenFiles:
    def wrapped(self, **settings):
        params = {"layers": jnp.ones((LAYERS, WIDTH, WIDTH)), "head": jnp.ones((WIDTH, 2))}
        return lora_jax.wrap(
            params, "layers", rank=2, axes={"layers": ("batch", "in", "out")}, **settings
        )

    names = (Rule("layers.{n}.dense.weight", "layers"), Rule("head.weight", "head"))

    def test_config(self, tmp_path):
        save(tmp_path / "adapter", self.wrapped(alpha=3), names=self.names)
        config = read_config(tmp_path / "adapter")
        assert config["peft_type"] == "LORA"
        assert (config["r"], config["lora_alpha"]) == (2, 3)
        assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
        assert config["target_modules"] == [f"layers.{n}.dense" for n in range(LAYERS)]
        assert (config["modules_to_save"], config["bias"]) == (None, "none")
        assert (config["use_dora"], config["use_rslora"], config["fan_in_fan_out"]) == (False,) * 3
        assert "target_parameters" not in config

    def test_patterns_for_what_differs(self, tmp_path):
        params = {name: jnp.ones((4, 4)) for name in "abc"}
        targets = {"a": {"rank": 3, "alpha": 3}, "[bc]": {"rank": 2, "alpha": 5}}
        wrapped = lora_jax.wrap(params, targets)
        save(tmp_path / "adapter", wrapped, names=[Rule("x.{n}.weight", "{n}")])
        config = read_config(tmp_path / "adapter")
        assert (config["r"], config["rank_pattern"]) == (2, {r"^x\.a": 3})
        assert (config["lora_alpha"], config["alpha_pattern"]) == (5, {r"^x\.a": 3})

    def test_rslora_where_the_config_has_it(self, tmp_path):
        wrapped = self.wrapped(alpha=3, rslora=True)
        save(tmp_path / "adapter", wrapped, names=self.names, config={"use_rslora": True})
        assert read_config(tmp_path / "adapter")["lora_alpha"] == 3
        params = lora_jax.unwrap(wrapped)
        loaded = load(tmp_path / "adapter", params, names=self.names)
        assert loaded["layers"].scale == wrapped["layers"].scale

    def test_unknown_keys_go_there_and_back(self, tmp_path):
        config = {
            "base_model_name_or_path": "someone/model",
            "auto_mapping": {"base_model_class": "os.system", "parent_library": "antigravity"},
            "from_the_future": {"list": [1, None, "é"]},
            "lora_dropout": 0.1,
            "layers_to_transform": [0],
            "exclude_modules": ["dense"],
        }
        save(tmp_path / "one", self.wrapped(), names=self.names, config=config)
        save(
            tmp_path / "two", self.wrapped(), names=self.names, config=read_config(tmp_path / "one")
        )
        assert read_config(tmp_path / "one") == read_config(tmp_path / "two")
        kept = read_config(tmp_path / "two")
        for key in ("base_model_name_or_path", "auto_mapping", "from_the_future", "lora_dropout"):
            assert kept[key] == config[key]
        # All adapted modules are named, so that nothing else chooses among them.
        assert not {"layers_to_transform", "exclude_modules"} & set(kept)
        assert "antigravity" not in sys.modules

    def test_names_that_end_alike(self, tmp_path):
        """In a list, PEFT would take `dense` for `other.dense` as well."""
        params = {"dense": jnp.ones((4, 4)), "other": {"dense": jnp.ones((4, 4))}}
        wrapped = lora_jax.wrap(params, lambda path, leaf: path == "dense", rank=2)
        names = [Rule("{module}.weight", "{module:.+}")]
        save(tmp_path / "adapter", wrapped, names=names)
        assert read_config(tmp_path / "adapter")["target_modules"] == "dense"

    def test_modules_that_peft_would_take_too(self, tmp_path):
        """An entry of `modules_to_save` may begin in the middle of a name."""
        params = {name: jnp.ones((4, 4)) for name in ("dense", "head", "pre_head")}
        wrapped = lora_jax.wrap(params, "dense", rank=2, train="head")
        save(tmp_path / "adapter", wrapped, names=[Rule("{n}.weight", "{n}")])
        tensors = tensors_of(tmp_path / "adapter")
        assert read_config(tmp_path / "adapter")["modules_to_save"] == ["head"]
        assert np.array_equal(tensors["pre_head.weight"], np.ones((4, 4)))

    def test_a_module_trains_as_a_whole(self, tmp_path):
        params = {"q": jnp.ones((4, 4)), "head": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}}
        wrapped = lora_jax.wrap(params, "q", rank=2, train="head/kernel")
        names = [
            Rule("q.weight", "q"),
            Rule("head.weight", "head/kernel"),
            Rule("head.bias", "head/bias"),
        ]
        save(tmp_path / "adapter", wrapped, names=names)
        assert {"head.weight", "head.bias"} < set(tensors_of(tmp_path / "adapter"))

    def test_a_single_number(self, tmp_path):
        params = {"q": jnp.ones((4, 4)), "temperature": jnp.ones(())}
        wrapped = as_if_trained(lora_jax.wrap(params, "q", rank=2, train="temperature"))
        names = [Rule("q.weight", "q"), Rule("head.temperature", "temperature", kind="array")]
        save(tmp_path / "adapter", wrapped, names=names)
        assert tensors_of(tmp_path / "adapter")["head.temperature"].shape == ()
        assert_identical(load(tmp_path / "adapter", params, names=names), wrapped)

    def test_tensors_are_contiguous_and_in_dtype(self, tmp_path):
        save(tmp_path / "adapter", self.wrapped(dtype=jnp.bfloat16), names=self.names)
        dtypes = {tensor.dtype for tensor in tensors_of(tmp_path / "adapter").values()}
        assert dtypes == {np.dtype(ml_dtypes.bfloat16)}

    def test_nothing_but_two_files(self, tmp_path):
        save(tmp_path / "runs" / "adapter", self.wrapped(), names=self.names)
        files = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.*"))
        assert [Path(file).name for file in files] == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]

    def test_overwriting(self, tmp_path):
        save(tmp_path / "adapter", self.wrapped(), names=self.names)
        newer = as_if_trained(self.wrapped())
        save(tmp_path / "adapter", newer, names=self.names, overwrite=True)
        loaded = load(tmp_path / "adapter", lora_jax.unwrap(newer), names=self.names)
        assert_identical(loaded, newer)
        assert list(tmp_path.iterdir()) == [tmp_path / "adapter"]

    @pytest.mark.parametrize("scale", [0.0, -1.5, 1e-30, 3.4e38, 1 / 7, 0.1])
    @pytest.mark.parametrize("rank", [1, 3, 7])
    @pytest.mark.parametrize("rslora", [False, True])
    def test_every_scale_is_exact(self, tmp_path, scale, rank, rslora):
        wrapped = lora_jax.wrap({"a": jnp.ones((8, 8))}, "a", rank=rank)
        node = dataclasses.replace(wrapped["a"], scale=jnp.float32(scale))
        names = [Rule("a.weight", "a")]
        save(tmp_path / "x", {"a": node}, names=names, config={"use_rslora": rslora})
        loaded = load(tmp_path / "x", {"a": node.base}, names=names)
        assert loaded["a"].scale == np.float32(scale)


def test_torch_is_not_needed(tmp_path):
    code = """
import sys
sys.modules["torch"] = None  # so that importing it fails
import jax.numpy as jnp, lora_jax
names = [lora_jax.exchange.peft.Rule("a.weight", "a")]
wrapped = lora_jax.wrap({"a": jnp.ones((4, 4))}, "a", rank=2)
lora_jax.exchange.peft.save(sys.argv[1], wrapped, names=names)
lora_jax.exchange.peft.load(sys.argv[1], {"a": jnp.ones((4, 4))}, names=names)
"""
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path / "adapter")]
    root = Path(lora_jax.__file__).parent.parent
    subprocess.run(command, check=True, cwd=root)


def test_without_safetensors(tmp_path, monkeypatch):
    tensors = {"a.lora_A.weight": numbers(2, 3), "a.lora_B.weight": numbers(3, 2)}
    folder = write_adapter(tmp_path / "adapter", tensors)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    names = [Rule("a.weight", "a")]
    with pytest.raises(ImportError, match=r"pip install 'lora-jax\[peft\]'"):
        load(folder, {"a": jnp.zeros((3, 3))}, names=names)
    with pytest.raises(ImportError, match=r"pip install 'lora-jax\[peft\]'"):
        save(tmp_path / "x", lora_jax.wrap({"a": jnp.ones((3, 3))}, "a", rank=1), names=names)
    assert list(tmp_path.iterdir()) == [folder]
