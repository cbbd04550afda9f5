"""Round trips: what `save` wrote, `load` reads again."""

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import init as lora_init
from lora_jax.exchange.peft import Rule, load, save
from tests.agreement import assert_agree, assert_identical
from tests.exchange.peft.files import numbers, random_factors, tensors_of
from tests.exchange.peft.models import MODELS
from tests.trained import as_if_trained

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
