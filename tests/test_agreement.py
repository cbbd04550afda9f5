"""The comparison that other tests rely on."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.agreement import assert_agree

LARGE = np.full((4, 3), 1e4)
SMALL = np.full(5, 1e-4)


def test_rounding_agrees() -> None:
    x = np.random.default_rng(0).standard_normal((50, 40))
    assert_agree({"a": jnp.float32(x), "b": [3, None]}, {"a": x, "b": [3, None]}, tolerance=1e-7)
    assert_agree(jnp.bfloat16(x), x, tolerance=4e-3)
    assert_agree(x * 1j, x * 1j)
    assert_agree({}, {})


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        ({"large": LARGE, "small": [SMALL * 1.001]}, r"'small/0' .* 0.001; the tolerance is 1e-05"),
        ({"large": LARGE * 1.01, "small": [SMALL * 1.001]}, r"'large' has .* 0.01"),
        ({"large": LARGE, "small": [SMALL * np.nan]}, r"'small/0' .* nan"),
        ({"large": LARGE, "small": [SMALL[:4]]}, r"'small/0' has the shape \(4,\), not \(5,\)"),
        ({"large": LARGE, "small": (SMALL,)}, r"the structure is .*\(\*,\).*, not .*\[\*\]"),
    ],
    ids=["small leaf", "worst leaf", "NaN", "shape", "structure"],
)
def test_what_differs_is_named(actual: object, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_agree(actual, {"large": LARGE, "small": [SMALL]})


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_what_is_not_finite_never_agrees(value: float) -> None:
    with pytest.raises(AssertionError):
        assert_agree(np.full(3, value), np.full(3, value))


def test_integers_must_be_equal() -> None:
    assert_agree(np.arange(10**6), np.arange(10**6))
    with pytest.raises(AssertionError, match="inf"):
        assert_agree(np.arange(10**6), np.append(np.arange(10**6 - 1), 0))


def test_what_cancels_agrees_relative_to_what_is_summed() -> None:
    remainder = np.float32(1e4) + np.float32(0.3) - np.float32(1e4)
    assert_agree({"a": [remainder]}, {"a": [0.3]}, size=1e4)
    assert_agree({"a": [remainder], "b": 1.0}, {"a": [0.3], "b": 1.0}, size={"a": LARGE, "b": 1.0})
    with pytest.raises(AssertionError):
        assert_agree({"a": [remainder]}, {"a": [0.3]})
    with pytest.raises(AssertionError):
        assert_agree(SMALL, np.zeros(5))
    assert_agree(SMALL, np.zeros(5), size=LARGE)
