"""Adapters that are restored beside another base than the one that they were saved beside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import BaseMismatchWarning, CheckpointError
from lora_jax._originals import original
from lora_jax.checkpoint import _fingerprints
from lora_jax.checkpoint._fingerprints import fingerprint, signed_sums
from tests.agreement import assert_identical
from tests.checkpoint.test_sharding import PLACES
from tests.checkpoint.trees import edit_json

KINDS = {
    "lora": {},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "olora with dora": {"init": "olora", "dora": True},
    "layers": {"layers": (0, 2)},
}
AXES = {"stack": ("batch", "in", "out")}


def params(dtype=np.float32, seed=0):
    generator = np.random.default_rng(seed)
    shapes = {"stack": (3, 40, 30), "head": (30, 7)}
    return {
        name: jnp.asarray(generator.normal(size=shape), dtype) for name, shape in shapes.items()
    }


def saved(folder, kind, weights):
    wrapped = lora_jax.wrap(weights, "stack", rank=2, axes=AXES, **KINDS[kind])
    lora_jax.save(folder / "adapters", wrapped)
    return folder / "adapters", wrapped


def with_one_other_number(weights):
    return {**weights, "stack": weights["stack"].at[1, 5, 6].add(0.25)}


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_the_same_base(self, tmp_path, kind):
        path, wrapped = saved(tmp_path, kind, params())
        assert_identical(lora_jax.restore(path, params()), wrapped)

    @pytest.mark.parametrize("change", [with_one_other_number, lambda weights: params(seed=1)])
    def test_other_numbers_are_refused(self, tmp_path, kind, change):
        path, wrapped = saved(tmp_path, kind, params())
        other = change(params())
        message = r"another base: `params` has other numbers .* at 'stack'.*check_base=False"
        with pytest.raises(CheckpointError, match=message):
            lora_jax.restore(path, other)
        restored = lora_jax.restore(path, other, check_base=False)
        assert_identical(lora_jax.split(restored)[0], lora_jax.split(wrapped)[0])

    def test_another_dtype_warns(self, tmp_path, kind):
        path, _ = saved(tmp_path, kind, params())
        other = params(jnp.bfloat16)
        with pytest.warns(BaseMismatchWarning, match="in float32, and .* bfloat16 at 'stack'"):
            lora_jax.restore(path, other)
        lora_jax.restore(path, other, check_base=False)

    def test_a_checkpoint_that_says_nothing_about_its_base(self, tmp_path, kind):
        path, _ = saved(tmp_path, kind, params())
        edit_json(path / "adapters.json", lambda content: content.pop("bases"))
        lora_jax.restore(path, params(seed=1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_base_that_is_the_same_to_rounding(tmp_path, init, dtype):
    """What an initialiser took out comes back to rounding, other on each machine."""
    weights = params(dtype)
    wrapped = lora_jax.wrap(weights, "stack", rank=2, axes=AXES, init=init)
    lora_jax.save(tmp_path / "adapters", wrapped)
    rounded = {**weights, "stack": original(wrapped["stack"])}
    assert not np.array_equal(rounded["stack"], weights["stack"])
    for each in (weights, rounded):
        lora_jax.restore(tmp_path / "adapters", each)
    finetuned = weights["stack"] * (1 + 64 * float(jnp.finfo(dtype).eps))
    with pytest.raises(CheckpointError, match="another base"):
        lora_jax.restore(tmp_path / "adapters", {**weights, "stack": finetuned})


def test_the_base_of_a_weight_that_is_trained_in_full(tmp_path):
    """Nothing is computed with it, and a head is often drawn anew."""
    wrapped = lora_jax.wrap(params(), "stack", rank=2, axes=AXES, train="head")
    lora_jax.save(tmp_path / "adapters", wrapped)
    restored = lora_jax.restore(tmp_path / "adapters", {**params(), "head": params(seed=1)["head"]})
    assert_identical(lora_jax.split(restored)[0], lora_jax.split(wrapped)[0])


def test_numbers_that_jax_cuts(tmp_path):
    """What NumPy has in 64 bits is a weight of 32 until JAX is allowed 64."""
    weights = {"kernel": np.random.default_rng(0).normal(size=(6, 4))}
    wrapped = lora_jax.wrap(jax.tree.map(jnp.asarray, weights), "kernel", rank=2)
    lora_jax.save(tmp_path / "adapters", wrapped)
    lora_jax.restore(tmp_path / "adapters", weights)
    with jax.enable_x64(True), pytest.warns(BaseMismatchWarning, match="float32, and .* float64"):
        lora_jax.restore(tmp_path / "adapters", weights)


class TestWithoutNumbers:
    def test_on_restoring(self, tmp_path):
        path, _ = saved(tmp_path, "lora", params())
        shapes = jax.eval_shape(params)
        restored = lora_jax.restore(path, shapes)
        assert restored["stack"].base is shapes["stack"]
        traced = jax.eval_shape(lambda weights: lora_jax.restore(path, weights), params(seed=1))
        assert traced["stack"].rank == 2

    def test_on_saving(self, tmp_path):
        path, wrapped = saved(tmp_path, "lora", params())
        adapters, frozen = lora_jax.split(wrapped)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), frozen)
        scales = jax.tree.map(lambda x, shape: x if x.ndim == 0 else shape, frozen, shapes)
        lora_jax.save(path, lora_jax.combine(adapters, scales), overwrite=True)
        lora_jax.restore(path, params(seed=1))


@pytest.mark.parametrize("place", PLACES)
def test_every_sharding(tmp_path, place):
    wrapped = PLACES["two by four"]()
    lora_jax.save(tmp_path / "adapters", wrapped)
    weights = lora_jax.unwrap(PLACES[place]())
    lora_jax.restore(tmp_path / "adapters", weights)
    kernel = weights["kernel"]
    other = jax.device_put(np.asarray(kernel) + np.eye(16, 8, dtype=np.float32), kernel.sharding)
    with pytest.raises(CheckpointError, match="other numbers .* at 'kernel'"):
        lora_jax.restore(tmp_path / "adapters", {**weights, "kernel": other})


class TestSignedSums:
    def test_are_the_same_on_every_mesh(self):
        arrays = [lora_jax.unwrap(place())["kernel"] for place in PLACES.values()]
        assert len({signed_sums(array, 1e-6) for array in [*arrays, np.asarray(arrays[0])]}) == 1

    def test_numbers_that_are_not_finite(self):
        array = np.array([np.nan, np.inf, -np.inf, 1.0], np.float32)
        assert signed_sums(array, 1e-3) == signed_sums(jnp.asarray(array), 1e-3)


@pytest.mark.parametrize("place", PLACES)
def test_an_array_of_which_a_process_has_a_part(place, monkeypatch):
    """The sum over a whole array, as compiled for all devices, is that over its parts."""
    array = lora_jax.unwrap(PLACES[place]())["kernel"]
    expected = fingerprint(array), signed_sums(array, 1e-6)
    monkeypatch.setattr(_fingerprints, "_parts", lambda array: [(array, ())])
    assert (fingerprint(array), signed_sums(array, 1e-6)) == expected


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("terms", [_fingerprints._mixed_bits, _fingerprints._signed_numbers])
def test_a_weight_is_read_and_not_copied(terms):
    array = jax.ShapeDtypeStruct((1000, 500), jnp.float32)
    starts = jax.ShapeDtypeStruct((2,), jnp.uint32)
    lowered = _fingerprints._sums_of_part.lower(terms, array.shape, array, starts, np.float32(1))
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 1000
