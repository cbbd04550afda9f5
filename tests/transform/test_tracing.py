"""`adapt`: when a function is traced, and when it is read again."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.agreement import assert_agree
from tests.transform.projection import KEY, MERGED, WRAPPED, X, project, trained, with_options


class Counted:
    """A function that counts how often it is traced."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.count = 0
        functools.update_wrapper(self, fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return self.fn(*args, **kwargs)


def test_a_thousand_calls_trace_once() -> None:
    fn = Counted(lambda p, x: x @ p["W"])
    adapted = lora_jax.adapt(fn)
    for _ in range(1000):
        adapted(WRAPPED, X)
    assert fn.count == 1


def test_what_traces_anew_and_what_does_not() -> None:
    fn = Counted(with_options)
    adapted = lora_jax.adapt(fn)
    adapted(WRAPPED, X)
    other_scale = {"W": dataclasses.replace(WRAPPED["W"], scale=jnp.float32(0.25))}
    for same in [
        lambda: adapted(other_scale, X + 1),
        lambda: adapted(WRAPPED, np.asarray(X)),
        lambda: adapted(jax.tree.map(lambda x: 2 * x, WRAPPED), X),
    ]:
        same()
        assert fn.count == 1
    for count, different in enumerate(
        [
            lambda: adapted(WRAPPED, X[:2]),
            lambda: adapted(WRAPPED, X, train=True),
            lambda: adapted(WRAPPED, X, "first"),
            lambda: adapted(trained(W=(24, 10)), X),
        ],
        start=2,
    ):
        different()
        different()
        assert fn.count == count


def test_another_scale_is_another_result_without_a_retrace() -> None:
    fn = Counted(lambda p, x: x @ p["W"])
    adapted = jax.jit(lora_jax.adapt(fn))
    base = X @ WRAPPED["W"].base
    for scale in (0.0, 1.0, -2.5):
        swapped = {"W": dataclasses.replace(WRAPPED["W"], scale=jnp.asarray(scale))}
        expected = base + scale * (X @ WRAPPED["W"].lora_A @ WRAPPED["W"].lora_B)
        assert_agree(adapted(swapped, X), expected)
    assert fn.count == 1


@pytest.mark.parametrize("scale", [2.0, 2, np.float32(2)])
def test_a_scale_that_is_a_plain_number(scale: Any) -> None:
    weight = {"W": dataclasses.replace(WRAPPED["W"], scale=scale)}
    expected = {"W": dataclasses.replace(WRAPPED["W"], scale=jnp.asarray(2.0))}
    assert_agree(lora_jax.adapt(project)(weight, X), lora_jax.adapt(project)(expected, X))


def test_equal_numbers_of_different_types_are_different() -> None:
    adapted = lora_jax.adapt(lambda p, x, n: (project(p, x), type(n)))
    assert [adapted(WRAPPED, X, n)[1] for n in (1, True)] == [int, bool]


def test_another_float_traces_nothing_again() -> None:
    fn = Counted(lambda p, x, n: n * project(p, x))
    adapted = lora_jax.adapt(fn)
    for number in np.linspace(-1, 1, 20).tolist():
        assert_agree(adapted(WRAPPED, X, number), number * project(MERGED, X))
    assert fn.count == 1


def test_a_float_has_no_dtype_of_its_own() -> None:
    half = X.astype(jnp.bfloat16)
    adapted = lora_jax.adapt(lambda p, x, n: (project(p, X), x * n))
    assert adapted(WRAPPED, half, 0.5)[1].dtype == jnp.bfloat16


def only_if_positive(params: Any, x: jax.Array, number: float) -> jax.Array:
    return project(params, x) * number if number > 0 else x


def as_a_number(params: Any, x: jax.Array, number: float) -> jax.Array:
    assert isinstance(number, float)
    return project(params, x) * math.exp(number)


def by_name(params: Any, x: jax.Array, number: float) -> jax.Array:
    return project(params, x) * {0.5: 2.0, 1.5: 3.0}[number]


@pytest.mark.parametrize("fn", [only_if_positive, as_a_number, by_name])
def test_a_float_whose_value_matters(fn: Callable[..., jax.Array]) -> None:
    counted = Counted(fn)
    adapted = lora_jax.adapt(counted)
    for _ in range(3):
        for number in (0.5, 1.5):
            assert_agree(adapted(WRAPPED, X, number), fn(MERGED, X, number))
    # One trace finds out that the value is needed, and each value has one of its own.
    assert counted.count == 3


@pytest.mark.parametrize("inside", [False, True], ids=["directly", "in a loop"])
def test_arithmetic_in_python_is_pythons(inside: bool) -> None:
    """1 - 0.99999999 is 0 in float32."""

    def fn(params: Any, x: jax.Array, decay: float) -> jax.Array:
        def corrected(x: jax.Array) -> jax.Array:
            return project(params, x) / (1 - decay)

        return jax.lax.map(lambda row: corrected(row[None]), x) if inside else corrected(x)

    for decay in (0.99999999, 0.999):
        assert_agree(lora_jax.adapt(fn)(WRAPPED, X, decay), fn(MERGED, X, decay))


def test_an_error_of_the_function_is_raised_as_it_is() -> None:
    def fn(params: Any, x: jax.Array, number: float) -> jax.Array:
        raise KeyError(type(number))

    with pytest.raises(KeyError, match="float"):
        lora_jax.adapt(fn)(WRAPPED, X, 0.5)


def test_zeros_of_either_sign_are_different() -> None:
    def fn(params: Any, x: jax.Array, number: float) -> jax.Array:
        return project(params, x) * math.copysign(1.0, float(number))

    adapted = lora_jax.adapt(fn)
    assert_agree(adapted(WRAPPED, X, 0.0), -adapted(WRAPPED, X, -0.0))


@dataclasses.dataclass
class Mutable:
    """Equal by value, and so not hashable."""

    factor: float


def test_an_object_that_changes_is_read_again() -> None:
    options = Mutable(1.0)
    adapted = lora_jax.adapt(lambda p, x, o: project(p, x) * o.factor)
    first = adapted(WRAPPED, X, options)
    options.factor = 2.0
    assert_agree(adapted(WRAPPED, X, options), 2 * first)


def test_equal_objects_trace_once() -> None:
    fn = Counted(lambda p, x, o: project(p, x) * o.factor)
    adapted = lora_jax.adapt(fn)
    for _ in range(5):
        adapted(WRAPPED, X, Mutable(2.0))
        adapted(WRAPPED, X, Mutable(3.0))
    assert fn.count == 2


@pytest.mark.parametrize(
    "bind",
    [
        lambda fn: functools.partial(fn, WRAPPED),
        lambda fn: functools.partial(functools.partial(fn, params=WRAPPED), x=X),
        lambda fn: functools.partial(functools.partial(fn, WRAPPED)),
    ],
)
def test_adapters_that_a_partial_holds(bind: Callable[..., Any]) -> None:
    bound = bind(project)
    arguments = () if "x" in bound.keywords else (X,)
    assert_agree(lora_jax.adapt(bound)(*arguments), project(MERGED, X))


@pytest.mark.parametrize("called", [lambda module: module, lambda module: module.__call__])
def test_adapters_that_a_module_holds(called: Callable[..., Any]) -> None:
    module = eqx.nn.MLP(24, 3, 8, 2, key=KEY)
    axes = {"weight": ("out", "in")}
    wrapped = lora_jax.wrap(module, "weight", rank=2, axes=axes, init="gaussian")
    trained = jax.tree.map(
        lambda label, x: x + 0.1 if label == "lora_B" else x, lora_jax.labels(wrapped), wrapped
    )
    assert_agree(lora_jax.adapt(called(trained))(X[0]), lora_jax.merge(trained)(X[0]))


class Options:
    """Equal to nothing but itself, whatever it holds."""

    def __init__(self, factors: list[float]) -> None:
        self.factors = factors


def test_an_object_that_is_itself_is_read_again_when_it_changes() -> None:
    fn = Counted(lambda p, x, o: project(p, x) * o.factors[0])
    adapted, options = lora_jax.adapt(fn), Options([1.0])
    for factor in (1.0, 2.0, 3.0):
        options.factors[0] = factor
        for _ in range(2):
            assert_agree(adapted(WRAPPED, X, options), factor * project(MERGED, X))
    assert fn.count == 3


@pytest.mark.parametrize("dtype", [np.float32, jnp.float32, np.dtype("float32"), "float32"])
def test_a_dtype_as_an_argument(dtype: Any) -> None:
    adapted = lora_jax.adapt(lambda p, x, dtype: project(p, x).astype(dtype))
    assert adapted(WRAPPED, X, dtype).dtype == jnp.float32


def test_an_array_that_jax_has_no_dtype_for() -> None:
    adapted = lora_jax.adapt(lambda p, x, names: {name: project(p, x) for name in names})
    assert sorted(adapted(WRAPPED, X, np.array(["a", "b"]))) == ["a", "b"]


@pytest.mark.parametrize("number", [1e300, -1e300, 1e-300, math.inf])
def test_a_float_that_no_array_holds_keeps_its_value(number: float) -> None:
    def fn(params: Any, x: jax.Array, number: float) -> jax.Array:
        return project(params, x) * (1.0 if number * 2 == math.inf else number / (2 * number))

    assert_agree(lora_jax.adapt(fn)(WRAPPED, X, number), fn(MERGED, X, number))


class Incomparable:
    """Neither hashable nor comparable, as an object that holds arrays is."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, factor: float) -> None:
        self.factor = np.array([factor, factor])

    def __eq__(self, other: object) -> Any:
        return self.factor == other.factor  # type: ignore[attr-defined]


def test_what_cant_be_compared_is_read_each_time() -> None:
    adapted = lora_jax.adapt(lambda p, x, o: project(p, x) * float(o.factor[0]))
    options = Incomparable(1.0)
    for factor in (1.0, 2.0):
        options.factor[0] = factor
        assert_agree(adapted(WRAPPED, X, options), factor * project(MERGED, X))


def test_an_argument_of_the_functions_own_called_lora_key() -> None:
    def fn(params: Any, x: jax.Array, lora_key: Any = None) -> jax.Array:
        return project(params, x) * (1 if lora_key is None else 2)

    adapted = lora_jax.adapt(fn)
    assert_agree(adapted(WRAPPED, X), project(MERGED, X))
    assert_agree(adapted(WRAPPED, X, lora_key=KEY), 2 * project(MERGED, X))
    assert_agree(adapted(WRAPPED, X, KEY), 2 * project(MERGED, X))
    with pytest.raises(ValueError, match="argument `lora_key` of its own"):
        lora_jax.adapt(fn, dropout=0.1)


def test_equal_objects_give_equal_results() -> None:
    adapted = lora_jax.adapt(lambda p, x, o: project(p, x) * o.factor)
    for factor in (1.0, 2.0):
        expected = factor * project(MERGED, X)
        assert_agree(adapted(WRAPPED, X, Mutable(factor)), expected)


def test_an_inner_function_stays_one_function() -> None:
    @jax.jit
    def layer(kernel: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ kernel)

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return layer(params["W"], layer(params["W"], layer(params["W"], x)))

    text = jax.jit(lora_jax.adapt(fn)).lower(WRAPPED, X).as_text()
    assert text.count("func.func private @layer") == 1
