"""`InferredAxes`: what is given by hand beside what `infer_axes` found."""

import functools
import operator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax

PARAMS = {
    "layer_0": {"table": np.ones((6, 4), np.float32), "kernel": np.ones((4, 4), np.float32)},
    "layer_1": {"table": np.ones((6, 4), np.float32), "kernel": np.ones((4, 4), np.float32)},
    "mixed": np.ones((4, 2, 2), np.float32),
}


def fn(params: Any, x: Any) -> Any:
    for layer in (params["layer_0"], params["layer_1"]):
        x = jnp.tanh(x @ layer["kernel"] + jnp.sum(jnp.sin(layer["table"])))
    heads = jnp.einsum("te,ehd->thd", x, params["mixed"])
    return jnp.sin(heads) + jnp.einsum("te,th,ehd->td", x, heads[..., 0], params["mixed"])[:, None]


@pytest.fixture(scope="module")
def inferred() -> lora_jax.transform.InferredAxes:
    return lora_jax.infer_axes(fn, PARAMS, np.ones((3, 4), np.float32))


OUT_IN, IN_OUT = ("out", "in"), ("in", "out")
HEADS, PAIRS = ("in", "out", "out"), ("in", "in", "out")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([{"mixed": HEADS}], {"mixed": HEADS}),
        ([{"mixed": HEADS}, {"layer_0/table": IN_OUT}], {"mixed": HEADS, "layer_0/table": IN_OUT}),
        ([{"mixed": HEADS}, {"mixed": PAIRS}], {"mixed": PAIRS}),
        ([{"table": OUT_IN}], {"layer_0/table": OUT_IN, "layer_1/table": OUT_IN}),
        (
            [{"table": OUT_IN}, {"layer_1/.*": IN_OUT}],
            {"layer_0/table": OUT_IN, "layer_1/table": IN_OUT, "layer_1/kernel": IN_OUT},
        ),
        (
            [{"layer_1/table": IN_OUT, "table": OUT_IN}],
            {"layer_0/table": OUT_IN, "layer_1/table": IN_OUT},
        ),
        ([{"kernel": ["out", "in"]}], {"layer_0/kernel": OUT_IN, "layer_1/kernel": OUT_IN}),
        ([], {}),
    ],
)
def test_given_axes_stand_beside_the_inferred_ones(
    inferred: lora_jax.transform.InferredAxes, given: Any, expected: Any
) -> None:
    axes = functools.reduce(operator.or_, given, inferred)
    kernels = {f"layer_{i}/kernel": IN_OUT for i in range(2)}
    assert dict(inferred) == kernels
    assert dict(axes) == kernels | expected
    assert set(inferred.disagreements) == {"mixed"}
    assert set(axes.disagreements) == {"mixed"} - set(expected)


@pytest.mark.parametrize("targets", ["all-linear", ".*", ["kernel", "all-linear"]])
@pytest.mark.parametrize("given", [{"mixed": HEADS}, {"m.*d": HEADS}, {"mixed|kernel": HEADS}])
def test_a_weight_with_given_axes_is_wrapped_by_them(
    inferred: lora_jax.transform.InferredAxes, given: Any, targets: Any
) -> None:
    axes = inferred | given | {"kernel": OUT_IN}
    wrapped = lora_jax.wrap(PARAMS, targets, rank=1, axes=axes)
    assert wrapped["mixed"].axes == HEADS
    assert wrapped["layer_1"]["kernel"].axes == OUT_IN
    assert isinstance(wrapped["layer_1"]["table"], np.ndarray)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mxed": HEADS}, "'mxed', which matches no leaf.*'mixed'"),
        ({"ixed": HEADS}, "matches no leaf"),
        ({"mixed": HEADS, "tables": IN_OUT}, "'tables', which matches no leaf"),
        ({"mixed(": HEADS}, r"'mixed\(', which is not a regular expression"),
    ],
)
def test_what_matches_nothing_is_refused(
    inferred: lora_jax.transform.InferredAxes, given: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=f"`axes`.*{message}"):
        inferred | given
