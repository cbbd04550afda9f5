"""Trees and arguments that are refused, with the call that fixes it."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.agreement import assert_agree
from tests.quantization.network import PARAMS, quantized

REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "no such leaf": (PARAMS, {"targets": "nope"}, ValueError, "`targets`: the expression 'nope'"),
    "a format": (PARAMS, {"format": "nf5"}, ValueError, "has the format 'nf5'; expected one of"),
    "a block of none": (PARAMS, {"block": 0}, ValueError, "has the block 0; expected at least 1"),
    "half a block": (PARAMS, {"block": 1.5}, TypeError, "has the block 1.5; expected a whole"),
    "a flag": (PARAMS, {"double_quantize": 1}, TypeError, "double_quantize=1; expected True, "),
    "whole numbers": ({"head": np.ones((3, 4), int)}, {}, ValueError, "not a floating-point one"),
    "complex": ({"head": np.ones((3, 4), np.complex64)}, {}, ValueError, "only real weights"),
    "one axis": ({"head": np.ones(3)}, {}, ValueError, "fewer than two axes"),
    "an infinity": ({"head": np.full((3, 4), np.inf)}, {}, ValueError, "not finite at 'head'"),
    "twice": (quantized(), {}, ValueError, "quantised already: 'head'"),
    "roles": (PARAMS, {"targets": "conv"}, ValueError, "`axes` is needed for 'conv'"),
    "an override": (PARAMS, {"targets": {"head": {"rank": 2}}}, ValueError, "overrides 'rank'"),
    "of a format": (PARAMS, {"targets": {"head": {"format": 4}}}, ValueError, "`targets` for 'hea"),
    "adapters": (lora_jax.wrap(PARAMS, "head", rank=1), {}, ValueError, "is wrapped already"),
}


@pytest.mark.wrong_types
@pytest.mark.parametrize("name", REFUSED)
def test_bad_input(name: str) -> None:
    params, options, error, match = REFUSED[name]
    with pytest.raises(error, match=match):
        lora_jax.quantize(params, **{"targets": "head", **options})


def test_codes_and_scales_that_are_not_declared_are_refused_with_what_declares_them() -> None:
    params = {"q": {"codes": jnp.ones((8, 4), jnp.int8), "scales": jnp.ones((2, 4))}}
    with pytest.raises(ValueError, match=r"lora_jax\.QuantizedWeight\(codes=.*declare\(params"):
        lora_jax.wrap(params, "q/scales", rank=1)
    with pytest.raises(ValueError, match=r"QuantizedWeight or with quantization\.declare"):
        lora_jax.wrap(params, "q/codes", rank=1)
    # The call that the message gives makes a weight of them.
    weight = lora_jax.QuantizedWeight(**params["q"], format="int8", block=4, blocked_shape=(8,))
    made = lora_jax.wrap({"q": weight}, "q", rank=1)
    assert_agree(lora_jax.merge(made)["q"], np.ones((8, 4)))
