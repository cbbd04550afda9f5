"""What a file means, number by number, in files made by hand; without PyTorch."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import lora_jax
from lora_jax import CheckpointError
from lora_jax.exchange.peft import Rule, load, read_config, save
from tests.agreement import assert_agree
from tests.exchange.peft.files import numbers, write_adapter

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
