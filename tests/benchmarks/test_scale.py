"""Plans of small models for virtual devices, and how programs are read."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import llama_layers
from benchmarks.scale import llama, plans
from benchmarks.scale.__main__ import main
from benchmarks.scale.collectives import collectives
from benchmarks.scale.flops import product_flops

SIZES = llama_layers.Sizes(layers=3, embed=64, hidden=128, heads=4, kv_heads=2, vocabulary=128)
TASK = plans.Task(
    model="small",
    sizes=SIZES,
    kind=plans.LORA,
    machine="cpu",
    devices=8,
    tensor=2,
    length=32,
    rank=4,
    dtype=jnp.float32,
)


@pytest.fixture(autouse=True)
def promotion_of_optax():
    """Lets Adam raise its decay, a float, to the power of its count, an integer."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def plan_of_kind():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return {kind: plans.plan_of(dataclasses.replace(TASK, kind=kind)) for kind in plans.KINDS}


def test_the_parameters_are_those_of_the_paper():
    billions = [llama.parameter_count(sizes) / 1e9 for sizes in llama_layers.SIZES.values()]
    assert billions == pytest.approx([8.03, 70.6, 405.9], rel=1e-2)


def test_the_loss_is_that_of_a_model_without_blocks(monkeypatch):
    """Attention and the loss in blocks give what they give at once."""
    shapes = llama.shapes(SIZES, jnp.float32)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda s: random.standard_normal(s.shape, np.float32) / 8, shapes)
    tokens = random.integers(0, SIZES.vocabulary, (2, 33))
    mesh = plans.mesh_of(dataclasses.replace(TASK, devices=1, tensor=1))
    with jax.set_mesh(mesh):
        whole = llama.loss(SIZES, params, tokens)
        monkeypatch.setattr(llama_layers, "_QUERIES", 8)
        monkeypatch.setattr(llama, "_TOKENS", 4)
        np.testing.assert_allclose(llama.loss(SIZES, params, tokens), whole, rtol=1e-5)
    assert 0.5 * np.log(SIZES.vocabulary) < whole < 2 * np.log(SIZES.vocabulary)


def test_what_a_device_holds(plan_of_kind):
    lora, nf4, full = (plan_of_kind[kind] for kind in plans.KINDS)
    assert full.base == 0
    assert full.trained == pytest.approx(lora.base, rel=0.01)
    assert full.optimizer == pytest.approx(2 * full.trained, rel=0.01)
    assert lora.optimizer == pytest.approx(2 * lora.trained, rel=0.01)
    assert lora.trained < 0.5 * lora.base
    assert nf4.trained == lora.trained
    # The embedding and the head, which are not quantised, are a quarter of this small model.
    assert nf4.base < 0.5 * lora.base
    assert lora.total < full.total
    assert lora.flops_per_token < full.flops_per_token
    # Two operations for each weight forward, twice because of remat, and two for inputs' gradients.
    weights = llama.parameter_count(SIZES) - SIZES.vocabulary * SIZES.embed
    assert 6 * weights < lora.flops_per_token < 9 * weights


@pytest.mark.parametrize("kind", [plans.LORA, plans.NF4])
def test_more_devices_hold_less_each(kind):
    held = []
    for devices in (2, 4, 8):
        task = dataclasses.replace(TASK, kind=kind, devices=devices)
        _, arguments = plans.program(task, plans.mesh_of(task))
        held.append(sum(map(plans.device_bytes, arguments[:3])))
    assert held[0] > 1.3 * held[1] > 1.3**2 * held[2]


def test_collectives_count_as_often_as_loops_run():
    text = """
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %g = f32[8]{0} all-gather(%x), dimensions={0}
  %s = (f32[4]{0}, f32[8]{0}) all-gather-start(%x), dimensions={0}
  %d = f32[8]{0} all-gather-done(%s)
}

%condition (p: (s32[], f32[4])) -> pred[] {
  %n = s32[] constant(6)
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%t), condition=%condition, body=%body
  %k = s32[] while(%t), condition=%other, body=%body, backend_config={"known_trip_count":{"n":"2"}}
  %r = (bf16[2,3]{1,0}, f32[5]{0}) all-reduce(%a, %b), to_apply=%sum
  %p = (f32[7]{0}, f32[7]{0}, u32[], u32[]) collective-permute-start(%x)
}
"""
    found = {kind: (each.count, each.bytes) for kind, each in collectives(text).items()}
    assert found == {
        "all-gather": (16, 8 * 64),
        "all-reduce": (1, 2 * 6 + 4 * 5),
        "collective-permute": (1, 28),
    }


def test_operations_of_products():
    def function(x, stack):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)
        return jnp.einsum("bi,bo->io", x, x)

    shapes = jax.ShapeDtypeStruct((4, 5), "float32"), jax.ShapeDtypeStruct((3, 5, 5), "float32")
    assert product_flops(function, *shapes) == 3 * 2 * 4 * 5 * 5 + 2 * 5 * 5 * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--machine", "tpu-v5p", "--devices", "7"], "no slice of 7 devices here; expected one of"),
        (["--machine", "tpu-v5p"], r"needs libtpu, which is not installed: pip install --no-deps"),
        (["--machine", "h100"], r"needs jax-cuda12-plugin, which is not installed"),
        (["--tensor", "3"], "--tensor 3 does not divide 8 devices"),
        (["--tensor", "16", "--devices", "16"], "does not divide the 8 heads of keys of 8b"),
        (["--machine", "tpu-v9"], "invalid choice: 'tpu-v9'"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.machines._is_installed", lambda module: False)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message.replace("\\", "") in error.replace("\n", " ")


def test_the_command_prints_writes_and_draws(plan_of_kind, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.scale.__main__.plan_of", lambda task: plan_of_kind[task.kind])
    files = [str(tmp_path / name) for name in ("plan.json", "plan.png")]
    assert main(["--kind", "lora", "--kind", "nf4", "--json", files[0], "--picture", files[1]]) == 0
    shown = capsys.readouterr().out
    assert "8b" in shown
    assert "TFLOP/token" in shown
    rows = json.loads((tmp_path / "plan.json").read_text())
    assert [row["kind"] for row in rows] == ["lora", "nf4"]
    assert rows[0]["total"] == plan_of_kind["lora"].total
    assert (tmp_path / "plan.png").stat().st_size > 1_000
