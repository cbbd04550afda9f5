"""What `wrap` adapts of a tree, told by dtypes, shapes, names and neighbours."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax._paths import leaves_with_paths

FLOAT8 = jnp.float8_e4m3fn


def array(*shape: int, dtype: Any = jnp.float32) -> Any:
    return jnp.asarray(np.ones(shape), dtype)


def adapted(params: Any, targets: Any = ".*", **options: Any) -> set[str]:
    wrapped = lora_jax.wrap(params, targets, rank=1, **options)
    nodes = leaves_with_paths(wrapped, is_leaf=lambda x: isinstance(x, lora_jax.LoRAWeight))
    return {path for path, node in nodes if isinstance(node, lora_jax.LoRAWeight)}


# --- biases ------------------------------------------------------------------------------------

# Each tree, and the leaf by a bias's name in it: "bias", "weight" or "unclear".
NAMED_AS_BIASES: dict[str, tuple[Any, str, str]] = {
    "heads": ({"kernel": array(8, 2, 4), "bias": array(2, 4)}, "bias", "bias"),
    "heads of a flat kernel": ({"kernel": array(8, 8), "bias": array(2, 4)}, "bias", "bias"),
    "heads of Haiku": ({"w": array(8, 2, 4), "b": array(2, 4)}, "b", "bias"),
    "a stack": ({"kernel": array(3, 8, 5), "bias": array(3, 5)}, "bias", "bias"),
    "a stack of Haiku": ({"w": array(3, 8, 5), "b": array(3, 5)}, "b", "bias"),
    "a stack of heads": ({"kernel": array(3, 8, 2, 4), "bias": array(3, 2, 4)}, "bias", "bias"),
    "a stack of Equinox": ({"weight": array(3, 5, 8), "bias": array(3, 5)}, "bias", "bias"),
    "a convolution": ({"weight": array(6, 4, 3, 3), "bias": array(6, 1, 1)}, "bias", "bias"),
    "a stack of norms": (
        {"scale": array(3, 5), "bias": array(3, 5), "w": array(4, 4)},
        "bias",
        "bias",
    ),
    "a row": ({"w": array(8, 5), "b": array(1, 5)}, "b", "bias"),
    "in a list": ([{"w": array(8, 2, 4), "b": array(2, 4)}], "0/b", "bias"),
    "letters": ({"a": array(8, 6), "b": array(6, 8)}, "b", "weight"),
    "square letters": ({"a": array(8, 8), "b": array(8, 8), "c": array(8, 8)}, "b", "weight"),
    "letters in a list": ([{"a": array(8, 6), "b": array(6, 7)}], "0/b", "weight"),
    "a square beside a square": ({"w": array(8, 8), "b": array(8, 8)}, "b", "unclear"),
    "alone": ({"b": array(8, 8)}, "b", "unclear"),
    "a table of positions": ({"bias": array(32, 8), "w": array(5, 5)}, "bias", "unclear"),
    "one output": ({"a": array(4, 8), "b": array(8, 1)}, "b", "unclear"),
    "as many outputs": ({"a": array(8, 6), "b": array(3, 2)}, "b", "unclear"),
    "another module's": ({"q": {"w": array(8, 8)}, "b": array(2, 4)}, "b", "unclear"),
}


@pytest.mark.parametrize("name", NAMED_AS_BIASES)
class TestNamedAsABias:
    def test_a_matched_module(self, name: str) -> None:
        params, path, kind = NAMED_AS_BIASES[name]
        if kind == "unclear":
            with pytest.raises(ValueError, match=f"'{path}'.*exclude='{path}'.*infer_axes"):
                adapted(params, axes=axes_of(params))
        elif kind == "bias" and len(adapted_otherwise(params, path)) == 0:
            with pytest.raises(ValueError, match="it is a bias"):
                adapted(params, axes=axes_of(params))
        else:
            expected = adapted_otherwise(params, path) | ({path} if kind == "weight" else set())
            assert adapted(params, axes=axes_of(params)) == expected

    def test_its_own_name(self, name: str) -> None:
        params, path, _ = NAMED_AS_BIASES[name]
        assert adapted(params, f"^{path}", axes=axes_of(params)) == {path}

    def test_all_but_it(self, name: str) -> None:
        params, path, kind = NAMED_AS_BIASES[name]
        others = adapted_otherwise(params, path)
        if kind == "unclear" and others:
            assert adapted(params, axes=axes_of(params), exclude=path) == others


def axes_of(params: Any) -> Mapping[str, Any]:
    return {
        path: ("in",) * (leaf.ndim - 1) + ("out",)
        for path, leaf in leaves_with_paths(params)
        if leaf.ndim > 2
    }


def adapted_otherwise(params: Any, path: str) -> set[str]:
    return {other for other, leaf in leaves_with_paths(params) if other != path and leaf.ndim > 1}


def test_the_function_tells_a_matrix_from_a_bias() -> None:
    params = {"a": array(4, 4), "b": array(4, 4), "bias": array(4, 4), "w": array(4, 4)}

    def fn(params: Any, x: Any) -> Any:
        return jnp.tanh(x @ params["w"] + params["bias"]) @ params["b"] + params["a"]

    assert adapted(params, axes=lora_jax.infer_axes(fn, params, array(4, 4))) == {"w", "b"}


# --- leaves that are no weights ------------------------------------------------------------------

NO_WEIGHTS: dict[str, tuple[Any, str]] = {
    "no rows": (array(0, 8), "holds no numbers"),
    "no columns": (array(8, 0), "holds no numbers"),
    "a stack of nothing": (array(0, 8, 4), "holds no numbers"),
    "a vector": (array(8), "fewer than two axes"),
    "complex": (array(8, 8, dtype=jnp.complex64), "complex64"),
    "bool": (array(8, 8, dtype=jnp.bool_), "bool"),
    "scales of microscaling": (array(8, 8, dtype=jnp.float8_e8m0fnu), "float8_e8m0fnu"),
    "no array": ("text", "not an array"),
} | {
    f"{dtype}": (array(8, 8, dtype=dtype), f"{dtype}.*quantization.declare")
    for dtype in ("int4", "uint4", "int8", "uint8", "int16", "int32", "uint32")
}


@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_what_is_no_weight_is_passed_over_in_a_module_and_refused_by_name(name: str) -> None:
    leaf, message = NO_WEIGHTS[name]
    params = {"module": {"kernel": array(16, 16), "other": leaf}}
    assert adapted(params) == adapted(params, "module") == {"module/kernel"}
    with pytest.raises(ValueError, match=rf"module/other.*{message}.*'module/kernel'"):
        adapted(params, "other")


# --- quantised weights ---------------------------------------------------------------------------

CODES = {"int8": jnp.int8, "uint8": jnp.uint8, "int4": jnp.int4, "float8": FLOAT8}


def quantised_layouts() -> dict[str, tuple[Any, tuple[str, ...]]]:
    """Returns modules with a quantised weight, as libraries lay them out, and what is in doubt."""
    layouts: dict[str, tuple[Any, tuple[str, ...]]] = {
        "GPTQ": (
            {
                "qweight": array(4, 16, dtype=jnp.int32),
                "qzeros": array(2, 2, dtype=jnp.int32),
                "scales": array(2, 16, dtype=jnp.float16),
                "g_idx": array(32, dtype=jnp.int32),
            },
            ("scales",),
        ),
        "AWQ": (
            {
                "qweight": array(32, 2, dtype=jnp.int32),
                "qzeros": array(2, 2, dtype=jnp.int32),
                "scales": array(2, 16, dtype=jnp.float16),
            },
            ("scales",),
        ),
        "AQT": (
            {"frozen": {"qvalue": array(8, 16, dtype=jnp.int8), "scale": [array(1, 16)]}},
            ("frozen/scale/0",),
        ),
        "NVFP4": (
            {
                "weight": array(16, 8, dtype=jnp.uint8),
                "weight_scale": array(16, 1, dtype=FLOAT8),
                "weight_scale_2": array(),
            },
            ("weight_scale",),
        ),
        "uneven blocks": (
            {"weight": array(16, 20, dtype=FLOAT8), "weight_scale_inv": array(2, 3)},
            ("weight", "weight_scale_inv"),
        ),
        "no telling names": (
            {"a": array(16, 32, dtype=jnp.uint8), "b2": array(16, 4)},
            ("b2",),
        ),
    }
    for name, dtype in CODES.items():
        is_float = ("weight",) if dtype is FLOAT8 else ()
        layouts |= {
            f"qwix, {name}": (
                {
                    "qvalue": array(32, 16, dtype=dtype),
                    "scale": array(1, 16),
                    "zero_point": array(1, 16),
                },
                ("scale", "zero_point", *(("qvalue",) if is_float else ())),
            ),
            f"a scale beside, {name}": (
                {"weight": array(16, 32, dtype=dtype), "weight_scale_inv": array(2, 4)},
                ("weight_scale_inv", *is_float),
            ),
            f"groups, {name}": (
                {"weight": array(16, 32, dtype=dtype), "scales": array(16, 4, 1)},
                ("scales", *is_float),
            ),
        }
    return layouts


LAYOUTS = quantised_layouts()


@pytest.mark.parametrize("name", LAYOUTS)
class TestQuantised:
    def test_no_part_is_adapted(self, name: str) -> None:
        module, parts = LAYOUTS[name]
        params = {"q_proj": {"kernel": module}, "o_proj": array(16, 16)}
        axes = axes_of(params)
        for targets in ("q_proj", ".*", *(f"kernel/{part}" for part in parts)):
            with pytest.raises(ValueError, match=r"'q_proj/kernel/.*quantised weight.*exclude="):
                adapted(params, targets, axes=axes)

    def test_the_rest_of_the_model_can_be(self, name: str) -> None:
        module, parts = LAYOUTS[name]
        params = {"q_proj": {"kernel": module}, "o_proj": array(16, 16)}
        exclude = [f"q_proj/kernel/{part}" for part in parts]
        assert adapted(params, exclude=exclude, axes=axes_of(params)) == {"o_proj"}


@pytest.mark.parametrize(
    "beside",
    [
        {"mask": array(16, 8, dtype=jnp.bool_)},
        {"mask": array(16, 8, dtype=jnp.int8)},
        {"position_ids": array(1, 512, dtype=jnp.int32)},
        {"relative_position_index": array(49, 49, dtype=jnp.int32)},
        {"count": array(dtype=jnp.int32)},
        {"narrow": array(16, 16, dtype=FLOAT8)},
        {"tokens": array(100, dtype=jnp.uint8)},
        {"scale": array(8)},
    ],
    ids=lambda module: f"{next(iter(module))}",
)
def test_a_weight_beside_other_arrays_is_no_scale(beside: Any) -> None:
    floats = {name for name, leaf in beside.items() if leaf.dtype == FLOAT8}
    assert adapted({"kernel": array(16, 8), **beside}) == {"kernel"} | floats


def test_the_function_tells_a_weight_from_scales() -> None:
    params = {
        "table": array(16, 8, dtype=jnp.int8),
        "kernel": array(8, 4),
        "scale": array(1, 8),
        "qvalue": array(8, 8, dtype=jnp.int8),
    }

    def fn(params: Any, x: Any) -> Any:
        weight = params["qvalue"].astype(x.dtype) * params["scale"]
        return jnp.tanh(x @ weight @ params["kernel"])[params["table"][0, 0].astype(int)]

    axes = lora_jax.infer_axes(fn, params, array(8, 8))
    assert adapted(params, axes=axes) == {"kernel"}
    with pytest.raises(ValueError, match="'kernel'.*quantised weight"):
        adapted(params, "kernel")


# --- exclude -----------------------------------------------------------------------------------

PARAMS = {
    "query": {"kernel": array(8, 8), "bias": array(8)},
    "value": {"kernel": array(8, 8), "bias": array(8)},
    "head": array(8, 4),
}


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        ("head", r"'head'.*head \(8, 4\).*does not select.*nearest.*'query/kernel'"),
        (["query", "head"], "'head'.*does not select"),
        ("query/bias", "'query/bias'.*does not select"),
        (lambda path, leaf: path == "head", "predicate.*does not select"),
        ({"head": {}}, "'head'.*does not select"),
    ],
    ids=["expression", "one of two", "bias", "predicate", "mapping"],
)
def test_exclude_must_exclude_something(exclude: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"`exclude`: .*{message}"):
        adapted(PARAMS, ["query", "value"], exclude=exclude)


# --- train -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "complex64", "float8_e5m2"])
def test_train_takes_what_an_optimiser_can_update(dtype: Any) -> None:
    params = {"kernel": array(8, 8), "other": array(4, dtype=dtype)}
    with pytest.raises(ValueError, match=rf"`train`: .*other \(4,\): its dtype is {dtype}"):
        lora_jax.wrap(params, "kernel", rank=1, train="other")
