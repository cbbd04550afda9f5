"""The registry of rules: each on a primitive that JAX has, whatever context asks for it first."""

import subprocess
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

from lora_jax._compat import Jaxpr, Primitive, inner_jaxprs, primitives
from lora_jax.transform import rules
from tests.battery.ops import OPS
from tests.battery.registry import ROWS, WIDTH

CONTEXTS = {
    "a mesh": "jax.set_mesh(jax.make_mesh((1,), ('d',), axis_types=(jax.sharding.AxisType.Auto,)))",
    "an explicit mesh": "jax.set_mesh(jax.make_mesh((1,), ('i',)))",
    "nothing": "contextlib.nullcontext()",
}
FIRST_USE = """
import contextlib, jax, jax.numpy as jnp, lora_jax
wrapped = lora_jax.wrap({{"W": jnp.ones((3, 2))}}, "W", rank=1)
apply = lora_jax.adapt(lambda params, x: x @ params["W"])
with {context}:
    print({call})
"""


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_the_first_use_may_be_in_any_context(context: str) -> None:
    call = "jax.jit(jax.vmap(lambda x: apply(wrapped, x), axis_name='i'))(jnp.ones((2, 3))).sum()"
    done = subprocess.run(
        [sys.executable, "-c", FIRST_USE.format(context=context, call=call)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 12


def test_a_rule_belongs_to_one_family() -> None:
    families = [family.rules() for family in rules._FAMILIES]
    assert len(rules.rules()) == sum(map(len, families))


@pytest.mark.parametrize("interpretation", ["with_factors", "with_roles", "with_rows"])
def test_each_interpretation_covers_every_primitive(interpretation: str) -> None:
    evaluations = getattr(rules, interpretation)()
    assert set(evaluations) == set(rules.rules())
    assert all(map(callable, evaluations.values()))


def test_products_are_seen_by_each_interpretation() -> None:
    """What multiplies a weight by an activation has a say in all three."""
    for name in ("dot_general", "conv_general_dilated", "ragged_dot_general"):
        (rule,) = [rule for primitive, rule in rules.rules().items() if primitive.name == name]
        assert len({rule.factors, rule.roles, rule.rows}) == 3


def primitives_in(jaxpr: Jaxpr) -> Iterator[Primitive]:
    for equation in jaxpr.eqns:
        yield equation.primitive
        for body in inner_jaxprs(equation):
            yield from primitives_in(body)


@pytest.mark.usefixtures("promoted_ranks")
def test_no_rule_is_on_what_jax_emits_no_more() -> None:
    """Ops of the battery, and what the registry traced to find a primitive, meet every rule."""
    met = set()
    for op in OPS:
        weight = jax.ShapeDtypeStruct((4, 6, 8)[: op.ndims[-1]], jnp.float32)
        x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
        met |= set(primitives_in(jax.make_jaxpr(op.once)(weight, weight, x).jaxpr))
    unlisted = {each for each in rules.rules() if each not in vars(primitives).values()}
    # One call within a derivative, where JAX has no other name for it; one sum without check_vma.
    beside = {primitives.closed_call_p, primitives.psum_p}
    assert set(rules.rules()) - met <= unlisted | beside


def test_rules_are_on_what_jax_emits() -> None:
    (product,) = jax.make_jaxpr(jnp.matmul)(jnp.ones((2, 2)), jnp.ones((2, 2))).eqns
    assert product.primitive in rules.rules()
    assert all(isinstance(each, Primitive) for each in rules.rules())
