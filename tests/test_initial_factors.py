"""How initialisers are compiled and checked, whatever they compute."""

import dataclasses
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax._initial_factors import _program
from tests.agreement import assert_agree

KERNEL = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)


class Counting:
    """An initialiser that counts how often it is traced."""

    def __init__(self) -> None:
        self.traces = 0

    def __call__(
        self, key: Any, weight2d: Any, rank: int, scale: float, *statistics: Any, gain: Any = 1.0
    ) -> Any:
        self.traces += 1
        base, lora_A, lora_B = lora_jax.init.kaiming(key, weight2d, rank, scale)
        return base, lora_A * jnp.asarray(gain, lora_A.dtype).ravel()[0], lora_B


class Unhashable(Counting):
    __hash__ = None


def wrapped(init: Any, **options: Any) -> lora_jax.LoRAWeight:
    params = {"kernel": options.pop("kernel", KERNEL)}
    return lora_jax.wrap(params, "kernel", **{"rank": 2, "init": init, **options})["kernel"]


TWICE: dict[str, Callable[[Counting], Any]] = {
    "a function": lambda counting: counting,
    "equal partials": lambda counting: functools.partial(counting, gain=2.0),
    "equal partials of partials": lambda counting: functools.partial(
        functools.partial(counting, gain=3.0), gain=2.0
    ),
    "a method": lambda counting: counting.__call__,
    "equal partials of data": lambda counting: lora_jax.init.DataInitializer(
        functools.partial(counting, gain=2.0), {"kernel": jnp.ones((1, 3))}
    ),
}


@pytest.mark.parametrize("name", TWICE)
def test_what_computes_the_same_is_traced_once(name: str) -> None:
    counting = Counting()
    for _ in range(3):
        wrapped(TWICE[name](counting))
    assert counting.traces == 1


def test_what_can_not_be_hashed_is_known_by_itself() -> None:
    counting = Unhashable()
    for _ in range(3):
        wrapped(counting)
    assert counting.traces == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"gain": 2.0}, {"gain": 3.0}),
        ({"gain": 1}, {"gain": True}),
        ({"gain": np.ones(1)}, {"gain": np.full(1, 2.0)}),
        ({"gain": jnp.ones(1)}, {"gain": jnp.ones(1)}),
        ({}, {"gain": 2.0}),
    ],
    ids=str,
)
def test_what_may_differ_is_traced_again(first: Any, second: Any) -> None:
    counting = Counting()
    nodes = [wrapped(functools.partial(counting, **options)) for options in (first, second)]
    assert counting.traces == 2
    for node, options in zip(nodes, (first, second), strict=True):
        gain = np.float32(np.ravel(options.get("gain", 1.0))[0])
        assert_agree(node.lora_A, wrapped("kaiming").lora_A * gain)


def test_no_more_than_a_number_of_programs_is_kept() -> None:
    assert _program.cache_info().maxsize == 256


def test_a_program_that_is_not_kept_holds_nothing() -> None:
    counting = Counting()
    held = weakref.ref(counting)
    wrapped(functools.partial(counting))
    _program.cache_clear()
    del counting
    gc.collect()
    assert held() is None


# --- the base ------------------------------------------------------------------------------------


def taken_out(key: Any, weight2d: Any, rank: int, scale: float, *, base: Any) -> Any:
    del key
    lora_A, lora_B = weight2d[:, :rank], weight2d[:rank] / 4
    return base(weight2d, scale * lora_A @ lora_B), lora_A, lora_B


BASES: dict[str, tuple[Callable[[Any, Any], Any], bool]] = {
    "the residual": (lambda W, change: W - change, True),
    "without the scale": (lambda W, change: W - change / 2, False),
    "zero": (lambda W, change: jnp.zeros_like(W), False),
    "the sum": (lambda W, change: W + change, False),
    "a copy of the weight": (lambda W, change: W + 0, False),
    "rounded to one byte": (
        lambda W, change: (
            jnp.round((W - change) / (scale := jnp.max(abs(W - change)) / 127)) * scale
        ),
        False,
    ),
    "rounded by the hardware": (
        lambda W, change: W - change * (1 + jnp.finfo(jnp.bfloat16).eps.astype(W.dtype) / 8),
        True,
    ),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", BASES)
def test_another_base_than_the_residual_is_refused(name: str, dtype: Any) -> None:
    base, is_right = BASES[name]
    init = functools.partial(taken_out, base=base)
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(64, 48)), dtype)
    if is_right:
        assert lora_jax.merge(wrapped(init, alpha=4, kernel=kernel)).dtype == dtype
    elif dtype == jnp.float32 or name != "rounded to one byte":
        with pytest.raises(ValueError, match=r"`init` returned a base for 'kernel'.* by 0\.\d+"):
            wrapped(init, alpha=4, kernel=kernel)


def test_one_wrong_matrix_of_a_stack_is_found() -> None:
    def init(key: Any, weight2d: Any, rank: int, scale: float) -> Any:
        lora_A, lora_B = weight2d[:, :rank], weight2d[:rank]
        residual = weight2d - scale * lora_A @ lora_B
        return jnp.where(weight2d[0, 0] > 100, weight2d, residual), lora_A, lora_B

    stack = np.random.default_rng(2).normal(size=(3, 8, 6)).astype(np.float32)
    axes = {"kernel": ("batch", "in", "out")}
    wrapped(init, kernel=stack, axes=axes)
    stack[1, 0, 0] = 101
    with pytest.raises(ValueError, match="returned a base for 'kernel'"):
        wrapped(init, kernel=stack, axes=axes)


def test_under_jit_nothing_is_known_of_the_base() -> None:
    init = functools.partial(taken_out, base=BASES["zero"][0])
    node = jax.jit(lambda kernel: wrapped(init, kernel=kernel))(KERNEL)
    assert_agree(lora_jax.merge(node), KERNEL)


@pytest.mark.parametrize("wrong", ["base", "lora_A", "lora_B"])
def test_other_shapes_are_refused_with_the_path(wrong: str) -> None:
    def init(key: Any, weight2d: Any, rank: int, scale: float) -> Any:
        arrays = {
            "base": weight2d,
            "lora_A": jnp.zeros((weight2d.shape[0], rank)),
            "lora_B": jnp.zeros((rank, weight2d.shape[1])),
        }
        return tuple((arrays | {wrong: arrays[wrong].T}).values())

    expected = r"\(8, 6\), \(8, 2\), \(2, 6\) are expected, for 'kernel'"
    with pytest.raises(ValueError, match=f"`init` returned a base of shape.*{expected}"):
        wrapped(init)


def test_a_frozen_dataclass_is_an_initialiser_of_its_fields() -> None:
    traces = []

    @dataclasses.dataclass(frozen=True)
    class Scaled:
        gain: float

        def __call__(self, key: Any, weight2d: Any, rank: int, scale: float) -> Any:
            traces.append(self.gain)
            base, lora_A, lora_B = lora_jax.init.kaiming(key, weight2d, rank, scale)
            return base, self.gain * lora_A, lora_B

    for gain in (1.0, 2.0, 2.0, 1.0):
        wrapped(Scaled(gain))
    assert traces == [1.0, 2.0]
