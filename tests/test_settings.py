"""What `wrap` can be told of each target: scale, layers, frozen leaves, exclusion."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.agreement import assert_agree
from tests.arrays import random

STACK = {"stack": ("batch", "in", "out")}


def params() -> dict[str, Any]:
    return {
        "stack": random(6, 5, 4),
        "query": {"kernel": random(5, 4), "bias": jnp.zeros(4)},
        "value": {"kernel": random(5, 4), "bias": jnp.zeros(4)},
    }


@pytest.mark.parametrize(
    ("rank", "alpha", "scale"), [(4, None, 2.0), (4, 16, 8.0), (2, 3.0, 3 / 2**0.5)]
)
def test_rslora_divides_by_the_root_of_the_rank(rank: int, alpha: Any, scale: float) -> None:
    wrapped = lora_jax.wrap(params(), "query", rank=rank, alpha=alpha, rslora=True)
    assert float(wrapped["query"]["kernel"].scale) == pytest.approx(scale)


def test_every_setting_may_differ_by_target() -> None:
    targets = {
        "stack": {"layers": [1], "rank": 3},
        "query": {"dora": True, "freeze": "lora_A", "dtype": jnp.bfloat16},
        "value": {"rslora": True, "alpha": 2, "init": "gaussian"},
    }
    wrapped = lora_jax.wrap(params(), targets, rank=4, axes=STACK)
    stack, query = wrapped["stack"], wrapped["query"]["kernel"]
    assert (stack.rank, stack.layers, stack.magnitude) == (3, (1,), None)
    assert (query.rank, query.frozen, query.lora_A.dtype) == (4, ("lora_A",), jnp.bfloat16)
    assert query.magnitude.dtype == jnp.float32
    assert float(wrapped["value"]["kernel"].scale) == 1


class TestLayers:
    @pytest.mark.parametrize("layers", [range(2, 4), (3, 2), np.array([2, 3])])
    def test_other_layers_get_no_numbers(self, layers: Any) -> None:
        node = lora_jax.wrap(params(), "stack", rank=2, axes=STACK, layers=layers)["stack"]
        assert (node.layers, node.lora_A.shape, node.lora_B.shape) == ((2, 3), (2, 5, 2), (2, 2, 4))
        assert node.shape == (6, 5, 4)

    @pytest.mark.parametrize("layers", [(2, 3), (0, 5)])
    def test_other_layers_stay_as_they_are(self, layers: tuple[int, ...]) -> None:
        wrapped = lora_jax.wrap(params(), "stack", rank=2, axes=STACK, layers=layers)
        node = wrapped["stack"]
        adapters, frozen = lora_jax.split(wrapped)
        adapters = jax.tree.map(jnp.ones_like, adapters)
        merged = lora_jax.merge(lora_jax.combine(adapters, frozen))["stack"]
        for layer in range(6):
            change = np.asarray(merged[layer] - node.base[layer])
            if layer in layers:
                np.testing.assert_allclose(change, 2, rtol=1e-5)
            else:
                assert not np.any(change)

    def test_all_layers_are_the_default(self) -> None:
        chosen = lora_jax.wrap(params(), "stack", rank=2, axes=STACK, layers=range(6))
        assert chosen["stack"].layers is None

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"targets": "query", "layers": [0]}, "`layers`.*query/kernel.*batch axis"),
            ({"layers": [6]}, "`layers`.*'stack'.*below 6"),
            ({"layers": []}, "`layers`.*at least one"),
            ({"layers": [-1]}, "`layers`.*counted from 0"),
            ({"layers": [1, 1]}, "`layers`.*each once"),
        ],
    )
    def test_refuses(self, options: dict[str, Any], message: str) -> None:
        options = {"targets": "stack", "axes": STACK, "rank": 2, **options}
        with pytest.raises(ValueError, match=message):
            lora_jax.wrap(params(), options.pop("targets"), **options)

    def test_numpy_weights(self) -> None:
        stack = {"stack": np.asarray(random(4, 6, 5))}
        wrapped = lora_jax.wrap(stack, "stack", rank=2, axes=STACK, layers=[1, 3], init="pissa")
        assert_agree(lora_jax.merge(wrapped)["stack"], stack["stack"])

    @pytest.mark.wrong_types
    @pytest.mark.parametrize("layers", ["0", 3, [0.5], [False, True]])
    def test_refuses_what_are_no_places(self, layers: Any) -> None:
        with pytest.raises(TypeError, match="`layers`"):
            lora_jax.wrap(params(), "stack", axes=STACK, rank=2, layers=layers)


class TestFreeze:
    @pytest.mark.parametrize("name", ["lora_A", "lora_B", "magnitude"])
    def test_a_frozen_leaf_is_labelled_so(self, name: str) -> None:
        wrapped = lora_jax.wrap(params(), "query", rank=2, dora=True, freeze=[name])
        assert getattr(lora_jax.labels(wrapped)["query"]["kernel"], name) == "frozen"
        adapters, _ = lora_jax.split(wrapped)
        assert getattr(adapters["query"]["kernel"], name) is None

    def test_its_gradient_is_not_computed(self, optimised: None) -> None:
        """The step with lora_A frozen is cheaper by the product that gives its gradient."""
        del optimised
        weights = {"kernel": random(64, 48)}
        adapted = lora_jax.adapt(lambda params, x: x @ params["kernel"])
        x = random(32, 64)

        def flops(**options: Any) -> float:
            wrapped = lora_jax.wrap(weights, "kernel", rank=4, **options)
            step = jax.jit(jax.grad(lambda wrapped: jnp.sum(adapted(wrapped, x) ** 2)))
            return step.lower(wrapped).compile().cost_analysis()["flops"]

        assert flops() - flops(freeze="lora_A") >= 2 * 32 * 64 * 4

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"freeze": "lora_B"}, "keeps lora_B of 'query/kernel' at zero.*'lora_A'"),
            ({"freeze": ["lora_A", "lora_B"]}, "leaves nothing of 'query/kernel' to train"),
            ({"freeze": "lora_A", "init": "mica"}, "leaves nothing of 'query/kernel'"),
            ({"freeze": "magnitude"}, "names the magnitude.*dora=True"),
        ],
    )
    def test_what_could_never_train_is_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            lora_jax.wrap(params(), "query", rank=2, **options)

    @pytest.mark.wrong_types
    @pytest.mark.parametrize("freeze", ["base", ["lora_A", "scale"], 3, {"lora_A"}, [["lora_A"]]])
    def test_refuses(self, freeze: Any) -> None:
        with pytest.raises(ValueError, match="`freeze`.*lora_A"):
            lora_jax.wrap(params(), "query", rank=2, freeze=freeze)


class TestExclude:
    @pytest.mark.parametrize("exclude", ["query", ["query"], lambda path, leaf: "query" in path])
    def test_exclude_wins_over_targets(self, exclude: Any) -> None:
        wrapped = lora_jax.wrap(
            params(), ["query", "value"], exclude=exclude, rank=2, train="query/bias"
        )
        assert not isinstance(wrapped["query"]["kernel"], lora_jax.LoRAWeight)
        assert isinstance(wrapped["value"]["kernel"], lora_jax.LoRAWeight)
        assert isinstance(wrapped["query"]["bias"], lora_jax.FullWeight)

    @pytest.mark.parametrize(
        ("exclude", "message"),
        [
            ("qery", "`exclude`.*'qery' matches no leaf.*query"),
            ("query|value", "`exclude` leaves nothing.*query/kernel"),
            ({"query": {"rank": 2}}, "`exclude` overrides 'rank'"),
        ],
    )
    def test_refuses(self, exclude: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            lora_jax.wrap(params(), ["query", "value"], exclude=exclude, rank=2)


@pytest.mark.wrong_types
def test_flags_are_booleans() -> None:
    for name in ("dora", "rslora"):
        with pytest.raises(TypeError, match=f"`{name}` is 1; expected True or False"):
            lora_jax.wrap(params(), "query", rank=2, **{name: 1})
