"""Every pair of layout, op, option and transform, in as few rows as hold them all."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from tests.battery.model import loss_of
from tests.battery.ops import OPS
from tests.battery.registry import Op
from tests.battery.rows import Row, suite_rows
from tests.battery.running import failures_of, mesh_of
from tests.typechecking import annotations_unchecked


def rows_of(op: Op) -> list[Row]:
    return [row for row in suite_rows() if row.op is op]


@pytest.mark.parametrize("op", OPS, ids=lambda op: f"{op.family}.{op.name}")
def test_adapted_is_dense(op: Op) -> None:
    rows = rows_of(op)
    # What an annotation says depends on the op above all.
    failures = failures_of(rows[:2])
    with annotations_unchecked():
        failures += failures_of(rows[2:])
    assert not failures, "\n".join(map(str, failures))


@pytest.mark.parametrize("op", [op for op in OPS if op.meshes], ids=lambda op: op.name)
def test_an_op_is_left_out_of_explicit_meshes_where_jax_refuses_it(op: Op) -> None:
    assert all(jax_accepts_on_an_explicit_mesh(op, ndim) for ndim in op.ndims) == op.explicit


def jax_accepts_on_an_explicit_mesh(op: Op, ndim: int) -> bool:
    """Says whether plain weights, cut along the last axis, go through the op and its gradient."""
    mesh = mesh_of("explicit")
    whole = PartitionSpec()
    cut = PartitionSpec(*(None,) * (ndim - 1), "d")
    weight = jax.ShapeDtypeStruct(
        (4, 6, 8)[:ndim], jnp.float32, sharding=jax.NamedSharding(mesh, cut)
    )
    x = jax.ShapeDtypeStruct((3, 192), jnp.float32, sharding=jax.NamedSharding(mesh, whole))

    def gradient(w, v, x):
        if not op.reverse:
            return op.once(w, v, x)
        return jax.grad(lambda w: loss_of(op.once(w, v, x)))(w)

    with jax.set_mesh(mesh):
        try:
            jax.eval_shape(gradient, weight, weight, x)
        except Exception:
            return False
    return True
