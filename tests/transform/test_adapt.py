"""`adapt`: what a function may take and return, when it is traced, and what is said."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import lora_jax
from tests.agreement import assert_agree

KEY = jax.random.key(6)


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(KEY, seed), shape)


def trained(**shapes: tuple[int, ...]) -> Any:
    params = {name: random(*shape, seed=i) / 4 for i, (name, shape) in enumerate(shapes.items())}
    wrapped = lora_jax.wrap(params, ".*", rank=2, alpha=3.0)
    return jax.tree.map(
        lambda label, x: random(*x.shape, seed=9) / 4 if label == "lora_B" else x,
        lora_jax.labels(wrapped),
        wrapped,
    )


WRAPPED = trained(W=(24, 24))
MERGED = lora_jax.merge(WRAPPED)
X = random(5, 24, seed=30)


def project(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["W"])


def assert_close(actual: Any, expected: Any) -> None:
    assert_agree(actual, expected)


# --- arguments and outputs ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    scale: float


class Model:
    def __init__(self, power: int) -> None:
        self.power = power

    def apply(self, params: Any, x: jax.Array) -> jax.Array:
        return project(params, x) ** self.power


def with_options(
    params: Any, x: Any, mode: Any = None, *, train: bool = False, activation: Any = jnp.tanh
) -> jax.Array:
    assert isinstance(train, bool)
    h = activation(x @ params["W"])
    return h * 2 if train else h[:1] if mode == "first" else h


CALLS: dict[str, tuple[Callable[..., Any], Callable[[Any], Any]]] = {
    "a flag": (with_options, lambda p: ((p, X), {"train": True})),
    "a string": (with_options, lambda p: ((p, X, "first"), {})),
    "None": (with_options, lambda p: ((p, X, None), {})),
    "a function": (with_options, lambda p: ((p, X), {"activation": jnp.sin})),
    "all by name": (with_options, lambda p: ((), {"params": p, "x": X, "train": True})),
    "numpy": (with_options, lambda p: ((p, np.asarray(X)), {})),
    "a frozen object": (
        lambda p, x, c: project(p, x) * c.scale,
        lambda p: ((p, X, Config(3.0)), {}),
    ),
    "a tree of options": (
        lambda p, x, o: project(p, x) * o["a"][0] if o["b"] else x,
        lambda p: ((p, X, {"a": (2.0, None), "b": True}), {}),
    ),
    "a list of trees": (
        lambda ps, x: project(ps[1], project(ps[0], x)),
        lambda p: (([p, p], X), {}),
    ),
    "two trees": (
        lambda a, x, b: project(b, project(a, x)),
        lambda p: ((p, X), {"b": p}),
    ),
    "a bare weight": (lambda w, x: x @ w, lambda p: ((p["W"], X), {})),
    "a bound method": (Model(2).apply, lambda p: ((p, X), {})),
    "a partial": (functools.partial(with_options, train=True), lambda p: ((p, X), {})),
    "a jitted function": (
        jax.jit(with_options, static_argnames=("train",)),
        lambda p: ((p, X), {"train": True}),
    ),
    "several outputs": (
        lambda p, x: (project(p, x), {"x": x, "norm": jnp.sum(x)}),
        lambda p: ((p, X), {}),
    ),
    "the weight itself": (lambda p, x: (p["W"], x), lambda p: ((p, X), {})),
}


@pytest.mark.parametrize(("fn", "arguments"), CALLS.values(), ids=CALLS)
@pytest.mark.filterwarnings("ignore::lora_jax.MaterializationWarning")
def test_calls(fn: Callable[..., Any], arguments: Callable[[Any], Any]) -> None:
    args, kwargs = arguments(WRAPPED)
    expected_args, expected_kwargs = arguments(MERGED)
    assert_close(lora_jax.adapt(fn)(*args, **kwargs), fn(*expected_args, **expected_kwargs))


def test_outputs_that_are_no_arrays() -> None:
    extras = {
        "name": "a",
        "count": 3,
        "rate": 0.5,
        "none": None,
        "function": len,
        "config": Config(1),
    }
    y, found = lora_jax.adapt(lambda p, x: (project(p, x), extras))(WRAPPED, X)
    assert found == extras
    assert y.shape == X.shape


def test_aux_outputs_of_a_gradient() -> None:
    def loss(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        y = project(params, x)
        return jnp.sum(y), {"y": y, "count": y.size}

    adapted = lora_jax.adapt(loss)
    (value, aux), gradient = jax.value_and_grad(adapted, has_aux=True)(WRAPPED, X)
    (expected, expected_aux) = loss(MERGED, X)
    assert_close((value, aux["y"]), (expected, expected_aux["y"]))
    assert jax.tree.structure(gradient) == jax.tree.structure(WRAPPED)


def test_the_name_and_signature_are_kept() -> None:
    adapted = lora_jax.adapt(project)
    assert (adapted.__name__, adapted.__wrapped__) == ("project", project)


def test_without_adapters_the_function_is_called_as_it_is() -> None:
    marker = object()
    assert lora_jax.adapt(lambda *args, **kwargs: (marker, args, kwargs))(1, a="b") == (
        marker,
        (1,),
        {"a": "b"},
    )


def test_weights_trained_in_full() -> None:
    params = {"W": random(24, 24), "b": random(24, seed=1)}

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["W"] + params["b"][None]

    wrapped = lora_jax.wrap(params, "W", rank=2, train="b")
    gradient = jax.grad(lambda w: lora_jax.adapt(fn)(w, X).sum())(wrapped)
    assert_agree(gradient["b"].value, np.full(24, 5.0))
    assert not np.any(np.asarray(gradient["b"].base))
    only_full = lora_jax.wrap(params, "W", rank=2, train="b")["b"]
    actual = lora_jax.adapt(fn)({"W": params["W"], "b": only_full}, X)
    assert_agree(actual, fn(params, X))


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    "options", [{"on_materialize": "raise"}, {"on_materialize": None}, {"dropout": 2.0}]
)
def test_options_are_checked_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` is"):
        lora_jax.adapt(project, **options)


# --- tracing -----------------------------------------------------------------------------------


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
    assert_close(lora_jax.adapt(project)(weight, X), lora_jax.adapt(project)(expected, X))


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


# --- transformations from outside --------------------------------------------------------------

CLOSURES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "jit": (jax.jit, lambda f: f(X)),
    "grad": (lambda f: jax.grad(lambda x: f(x).sum()), lambda f: f(X)),
    "vmap": (jax.vmap, lambda f: f(X)),
    "jit of vmap of grad": (
        lambda f: jax.jit(jax.vmap(jax.grad(lambda x: f(x).sum()))),
        lambda f: f(X),
    ),
    "jvp": (lambda f: lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),)), lambda f: f(X)),
    "linearize": (lambda f: lambda x: jax.linearize(f, x)[1](x), lambda f: f(X)),
    "jacfwd": (lambda f: jax.jacfwd(lambda x: f(x).sum(0)), lambda f: f(X)),
    "jacrev": (lambda f: jax.jacrev(lambda x: f(x).sum(0)), lambda f: f(X)),
    "hessian": (lambda f: jax.hessian(lambda x: f(x).sum()), lambda f: f(X[0])),
    "scan": (lambda f: lambda xs: jax.lax.scan(lambda c, x: (c, f(x)), 0, xs)[1], lambda f: f(X)),
    "map": (lambda f: lambda xs: jax.lax.map(f, xs), lambda f: f(X)),
    "remat": (lambda f: jax.grad(lambda x: jax.checkpoint(f)(x).sum()), lambda f: f(X)),
}


@pytest.mark.parametrize(("transform", "call"), CLOSURES.values(), ids=CLOSURES)
@pytest.mark.parametrize("closes_over", ["the input", "the weights"])
def test_closures(transform: Any, call: Any, closes_over: str) -> None:
    """The adapted function may close over values that are being traced."""
    if closes_over == "the input":
        actual = call(transform(lambda x: lora_jax.adapt(lambda p: project(p, x))(WRAPPED)))
    else:
        adapted = lora_jax.adapt(project)
        actual = call(transform(lambda x: adapted(WRAPPED, x)))
    assert_close(actual, call(transform(lambda x: project(MERGED, x))))


def test_derivatives_with_respect_to_factors() -> None:
    """Forward mode, and forward over reverse, beside the dense sum."""
    adapters, frozen = lora_jax.split(WRAPPED)
    direction = jax.tree.map(jnp.cos, adapters)

    def loss_of(fn: Callable[..., Any]) -> Callable[..., Any]:
        return lambda a: jnp.sum(fn(lora_jax.combine(a, frozen), X) ** 2)

    adapted = loss_of(lora_jax.adapt(project))
    dense = loss_of(lambda w, x: project(lora_jax.merge(w), x))
    for derivative in (
        lambda f: jax.jvp(f, (adapters,), (direction,)),
        lambda f: jax.jvp(jax.grad(f), (adapters,), (direction,)),
        lambda f: jax.grad(lambda a: jax.jvp(f, (a,), (direction,))[1])(adapters),
    ):
        actual, expected = derivative(adapted), derivative(dense)
        assert_agree(actual, expected)


def test_without_jit() -> None:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        layer = jax.jit(lambda w, h: jnp.tanh(h @ w))
        return jax.lax.scan(lambda h, _: (layer(params["W"], h), None), x, None, length=3)[0]

    with jax.disable_jit():
        actual = lora_jax.adapt(fn)(WRAPPED, X)
    assert_close(actual, fn(MERGED, X))


def test_donated_adapters() -> None:
    adapters, frozen = lora_jax.split(jax.tree.map(jnp.copy, WRAPPED))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(adapters: Any, frozen: Any, x: jax.Array) -> Any:
        def loss(adapters: Any) -> jax.Array:
            return lora_jax.adapt(project)(lora_jax.combine(adapters, frozen), x).sum()

        return jax.tree.map(lambda a, g: a - g, adapters, jax.grad(loss)(adapters))

    after = step(adapters, frozen, X)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(adapters))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))
    assert lora_jax.adapt(project)(lora_jax.combine(after, frozen), X).shape == X.shape


def constant_sizes(jaxpr: Any) -> list[int]:
    return [np.size(constant) for constant in jaxpr.consts]


def test_no_weight_becomes_a_constant() -> None:
    adapted = lora_jax.adapt(project)
    assert not any(size >= 24 for size in constant_sizes(jax.make_jaxpr(adapted)(WRAPPED, X)))
    text = jax.jit(adapted).lower(WRAPPED, X).as_text()
    assert 'dense<"0x' not in text


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("weight_spec", "x_spec"),
    [
        (PartitionSpec(None, "m"), PartitionSpec()),
        (PartitionSpec("m", None), PartitionSpec()),
        (PartitionSpec(), PartitionSpec("m", None)),
    ],
    ids=["outputs", "inputs", "examples"],
)
def test_sharded(axis_type: Any, weight_spec: Any, x_spec: Any) -> None:
    mesh = jax.make_mesh((8,), ("m",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        kernel = jax.device_put(WRAPPED["W"].base, jax.NamedSharding(mesh, weight_spec))
        x = jax.device_put(jnp.concatenate([X, X[:3]]), jax.NamedSharding(mesh, x_spec))
        wrapped = lora_jax.wrap({"W": kernel}, "W", rank=2)
        wrapped = {"W": dataclasses.replace(wrapped["W"], lora_B=WRAPPED["W"].lora_B)}
        for transform in (jax.jit, lambda fn: fn):
            actual = transform(lora_jax.adapt(project))(wrapped, x)
            plain = transform(project)({"W": kernel}, x)
            assert actual.sharding.is_equivalent_to(plain.sharding, 2)
            assert_close(np.asarray(actual), np.asarray(project(lora_jax.merge(wrapped), x)))
        merged = lora_jax.merge(wrapped)["W"]
        assert merged.sharding.is_equivalent_to(kernel.sharding, 2)


def test_effects_happen_once_and_in_order() -> None:
    seen = []

    def fn(params: Any, x: jax.Array) -> jax.Array:
        y = x @ params["W"]
        for name in ("first", "second"):
            jax.experimental.io_callback(
                lambda _, name=name: seen.append(name), None, y, ordered=True
            )
        return y

    jax.block_until_ready(jax.jit(lora_jax.adapt(fn))(WRAPPED, X))
    jax.effects_barrier()
    assert seen == ["first", "second"]


def test_mutable_arrays() -> None:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        total = jax.new_ref(jnp.zeros_like(x))
        for _ in range(2):
            total[...] += x @ params["W"]
        total[0] = total[1]
        return total[...]

    assert_close(lora_jax.adapt(fn)(WRAPPED, X), fn(MERGED, X))


# --- what is said ------------------------------------------------------------------------------


def with_sine(params: Any, x: jax.Array) -> jax.Array:
    return x @ jnp.sin(params["W"])


SINE_LINE = with_sine.__code__.co_firstlineno + 1

PLACES: dict[str, Callable[..., Any]] = {
    "directly": with_sine,
    "scan": lambda p, x: jax.lax.scan(lambda h, _: (with_sine(p, h), None), x, None, length=3)[0],
    "cond": lambda p, x: jax.lax.cond(x[0, 0] > -9, lambda: with_sine(p, x), lambda: x),
    "jit": jax.jit(with_sine),
    "remat": jax.checkpoint(with_sine),
    "while": lambda p, x: jax.lax.while_loop(
        lambda s: s[0] < 2, lambda s: (s[0] + 1, with_sine(p, s[1])), (0, x)
    )[1],
}


def warned(fn: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fn()
    assert all(issubclass(w.category, lora_jax.MaterializationWarning) for w in caught)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("fn", PLACES.values(), ids=PLACES)
def test_a_warning_names_path_op_and_line_once(fn: Callable[..., Any]) -> None:
    adapted = lora_jax.adapt(fn)
    (message,) = warned(lambda: adapted(WRAPPED, X))
    assert message.startswith("'W' reaches `sin` at ")
    assert f"test_adapt.py:{SINE_LINE} (with_sine)" in message
    assert warned(lambda: adapted(WRAPPED, X)) == []


def test_a_warning_points_at_the_users_code() -> None:
    with pytest.warns(lora_jax.MaterializationWarning) as caught:
        lora_jax.adapt(with_sine)(WRAPPED, X)
    with pytest.warns(lora_jax.MaterializationWarning) as caught_in_jit:
        jax.jit(lora_jax.adapt(with_sine))(WRAPPED, X)
    assert {warning.filename for warning in (*caught, *caught_in_jit)} == {__file__}


def test_a_rule_that_traces_a_line_twice_warns_once() -> None:
    fn = jax.custom_vjp(with_sine)
    fn.defvjp(lambda p, x: (fn(p, x), (p, x)), lambda r, g: jax.vjp(with_sine, *r)[1](g))
    messages = warned(lambda: jax.grad(lambda w: jnp.sum(lora_jax.adapt(fn)(w, X)))(WRAPPED))
    assert len(set(messages)) == len(messages) > 0


def test_each_weight_of_a_shared_function_is_warned_of() -> None:
    layer = jax.jit(lambda kernel, x: x @ jnp.sin(kernel))
    wrapped = trained(V=(24, 24), W=(24, 24))
    fn = lora_jax.adapt(lambda p, x: layer(p["W"], layer(p["V"], x)))
    first, second = warned(lambda: fn(wrapped, X))
    assert (first[:3], second[:3]) == ("'V'", "'W'")


def test_no_warning_for_what_is_factored_or_chosen() -> None:
    small = trained(W=(4, 3))
    assert warned(lambda: lora_jax.adapt(project)(WRAPPED, X)) == []
    assert warned(lambda: lora_jax.adapt(project)(small, jnp.ones((50, 4)))) == []


def test_a_weight_that_is_returned_is_said_to_be() -> None:
    (message,) = warned(lambda: lora_jax.adapt(lambda p: p["W"])(WRAPPED))
    assert "'W' reaches `the output`" in message


def test_refusing_or_ignoring() -> None:
    with pytest.raises(lora_jax.MaterializationError, match="'W' reaches `sin`.*targets"):
        lora_jax.adapt(with_sine, on_materialize="error")(WRAPPED, X)
    ignoring = lora_jax.adapt(with_sine, on_materialize="ignore")
    assert warned(lambda: ignoring(WRAPPED, X)) == []
    assert_close(ignoring(WRAPPED, X), with_sine(MERGED, X))
