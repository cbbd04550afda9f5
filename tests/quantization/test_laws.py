"""The laws of the design for quantised bases, as compiled programs.

The battery holds every layout, op and format to law 8 in float64. Here is what XLA makes of each
kind of use.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.agreement import assert_agree
from tests.cases import CASES, Case
from tests.problems import params_of
from tests.trained import as_if_trained
from tests.variants import KINDS_OF_USE

pytestmark = [
    pytest.mark.filterwarnings("ignore::lora_jax.MaterializationWarning"),
    pytest.mark.usefixtures("promoted_ranks"),
]


@dataclasses.dataclass(frozen=True)
class Kind:
    """How the weights of a case are quantised and wrapped."""

    name: str
    quantize: dict[str, Any]
    wrap: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)


KINDS = [
    Kind("nf4", {"format": "nf4"}),
    Kind("int8, DoRA", {"format": "int8", "block": None}, {"dora": True}),
    Kind("int4 in blocks of 3", {"format": "int4", "block": 3}),
    Kind("fp8", {"format": "fp8_e4m3"}),
]
USES = [case for case in CASES if case.name in KINDS_OF_USE]

grid = pytest.mark.parametrize(
    ("case", "kind"),
    [pytest.param(case, kind, id=f"{kind.name}-{case.name}") for kind in KINDS for case in USES],
)


@functools.cache
def weights_of(case: Case, index: int) -> tuple[Any, Any, Any]:
    """Returns quantised params, those wrapped, and an example."""
    kind = KINDS[index]
    params = lora_jax.quantize(params_of(case), case.targets, axes=case.axes, **kind.quantize)
    wrapped = lora_jax.wrap(params, case.targets, rank=case.rank, axes=case.axes, **kind.wrap)
    random = np.random.default_rng(11)
    largest = min(next(iter(case.shapes.values()))[0], 30)
    x = (
        random.integers(0, largest, case.x_shape, np.int32)
        if case.integer_x
        else random.standard_normal(case.x_shape).astype(np.float32)
    )
    return params, wrapped, jnp.asarray(x)


def with_gradients(case: Case, fn: Any) -> Any:
    """Returns a function of the halves of a wrapped tree and x to the output and gradients."""

    def loss(adapters: Any, frozen: Any, x: Any) -> Any:
        output = fn(lora_jax.combine(adapters, frozen), x)
        return jnp.sum(jnp.sin(output)), output

    if not case.reverse:
        return lambda adapters, frozen, x: (loss(adapters, frozen, x), None)
    return jax.value_and_grad(loss, has_aux=True)


@grid
def test_adapted_is_what_the_dequantised_weights_give(case: Case, kind: Kind) -> None:
    """Law 8: adapt(f)(wrap(quantize(p))) = adapt(f)(wrap(dequantize(quantize(p)))), and gradients.

    The right side is held to f(merge(...)) by the laws of dense weights.
    """
    _, wrapped, x = weights_of(case, KINDS.index(kind))
    trained = as_if_trained(wrapped)
    compute = jax.jit(with_gradients(case, lora_jax.adapt(case.fn)))
    (_, output), gradients = compute(*lora_jax.split(trained), x)
    dense = lora_jax.quantization.dequantize(trained)
    (_, expected), dense_gradients = compute(*lora_jax.split(dense), x)
    tolerance = 3e-5 if kind.wrap else 1e-5
    assert_agree(output, expected, tolerance=tolerance)
    assert_agree(
        jax.tree.leaves(gradients), jax.tree.leaves(dense_gradients), tolerance=2 * tolerance
    )
    assert_agree(output, jax.jit(case.fn)(lora_jax.merge(trained), x), tolerance=tolerance)


@grid
def test_nothing_changes_at_initialisation(case: Case, kind: Kind) -> None:
    """Law 1: a new adapter changes nothing."""
    params, wrapped, x = weights_of(case, KINDS.index(kind))
    expected = jax.jit(case.fn)(lora_jax.quantization.dequantize(params), x)
    tolerance = 3e-5 if kind.wrap else 1e-5
    adapted = jax.jit(lora_jax.adapt(case.fn))
    assert_agree(adapted(wrapped, x), expected, tolerance=tolerance)
    # Without an adapter anywhere, too.
    assert_agree(adapted(params, x), expected, tolerance=tolerance)


@grid
def test_unwrap_gives_the_codes_back(case: Case, kind: Kind) -> None:
    """Law 3: the quantised weights, the same arrays."""
    params, wrapped, _ = weights_of(case, KINDS.index(kind))
    for name, weight in lora_jax.unwrap(as_if_trained(wrapped)).items():
        assert jax.tree.structure(weight) == jax.tree.structure(params[name])
        for leaf, given in zip(jax.tree.leaves(weight), jax.tree.leaves(params[name]), strict=True):
            assert leaf is given


@grid
def test_codes_and_scales_get_no_gradient(case: Case, kind: Kind) -> None:
    """Law 4, when a caller differentiates the whole tree."""
    _, wrapped, x = weights_of(case, KINDS.index(kind))
    if not case.reverse:
        return
    adapted = lora_jax.adapt(case.fn)
    gradient_of = jax.jit(jax.grad(lambda p: jnp.sum(adapted(p, x)), allow_int=True))
    gradient = gradient_of(as_if_trained(wrapped))
    for node in gradient.values():
        if isinstance(node, lora_jax.LoRAWeight):
            for leaf in jax.tree.leaves(node.base):
                assert leaf.dtype == jax.dtypes.float0 or not np.any(np.asarray(leaf, np.float32))
            assert np.any(node.lora_B) or np.any(node.lora_A)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_batch_of_adapters_is_a_loop(kind: Kind) -> None:
    """Law 7."""
    case = USES[0]
    _, wrapped, x = weights_of(case, KINDS.index(kind))
    adapters, frozen = lora_jax.split(as_if_trained(wrapped))
    several = [jax.tree.map(lambda leaf, k=k: leaf * k, adapters) for k in (0.5, 1.0, -0.5)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    adapted = lora_jax.adapt(case.fn)
    one = jax.jit(lambda a: adapted(lora_jax.combine(a, frozen), x))
    together = jax.jit(jax.vmap(one))(stacked)
    for place, single in enumerate(several):
        assert_agree(together[place], one(single), tolerance=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_nothing_is_traced_again(kind: Kind) -> None:
    """Law 9: another adapter, another alpha and other codes of the same shapes."""
    case = next(case for case in USES if case.name == "dense_matrix")
    traces = []

    def fn(params: Any, x: Any) -> Any:
        traces.append(x.shape)
        return case.fn(params, x)

    compute = jax.jit(lora_jax.adapt(fn))
    _, wrapped, x = weights_of(case, KINDS.index(kind))
    compute(wrapped, x)
    count = len(traces)
    other = jax.tree.map(lambda leaf: leaf * 2, params_of(case))
    codes = lora_jax.quantize(other, case.targets, axes=case.axes, **kind.quantize)
    rewrapped = lora_jax.wrap(
        codes, case.targets, rank=case.rank, alpha=7, axes=case.axes, **kind.wrap
    )
    compute(as_if_trained(rewrapped), x)
    assert len(traces) == count
