"""The registry of rules: each on a primitive that JAX has, whatever context asks for it first."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from lora_jax._compat import Primitive
from lora_jax.transform import rules

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


def test_rules_are_on_what_jax_emits() -> None:
    (product,) = jax.make_jaxpr(jnp.matmul)(jnp.ones((2, 2)), jnp.ones((2, 2))).eqns
    assert product.primitive in rules.rules()
    assert all(isinstance(each, Primitive) for each in rules.rules())
