"""Plans of small models for virtual devices, and how programs are read."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks.scale import models, plans, report
from benchmarks.scale.__main__ import main
from benchmarks.scale.collectives import Traffic, collectives
from benchmarks.scale.flops import product_flops
from experiments.common.errors import InputError
from experiments.models.llama import Llama, LlamaConfig
from experiments.models.shapes import ONE_TOKEN, param_shapes

pytestmark = pytest.mark.slow

CONFIG = LlamaConfig(
    model_type="qwen3",
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
)
TASK = plans.Task(
    model="small",
    kind=plans.LORA,
    machine="cpu",
    devices=8,
    tensor=2,
    length=32,
    rank=4,
    dtype="float32",
)
PLAN = plans.Plan(
    base=3 * 2**30,
    trained=2**29,
    optimizer=2**30,
    activations=2**30,
    temporaries=2**30,
    flops_per_token=5.1e10,
    traffic={"all-gather": Traffic(5, 2**31), "all-reduce": Traffic(1, 7)},
    compile_seconds=1.0,
)


@pytest.fixture(autouse=True)
def promotion_of_optax():
    """Lets Adam raise its decay, a float, to the power of its count, an integer."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module", autouse=True)
def small_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "small", CONFIG)
        yield


@pytest.fixture(scope="module")
def plan_of_kind(small_model):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return {kind: plans.plan_of(dataclasses.replace(TASK, kind=kind)) for kind in plans.KINDS}


def parameter_count(config):
    return sum(leaf.size for leaf in jax.tree.leaves(param_shapes(Llama(config), ONE_TOKEN)))


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        ("llama-3.1-8b", 8.03),
        ("llama-3.1-70b", 70.6),
        ("llama-3.1-405b", 405.9),
        ("qwen3-8b", 8.19),
        ("qwen3-32b", 32.8),
    ],
)
def test_the_models_have_as_many_parameters_as_is_published(model, billions):
    assert parameter_count(models.MODELS[model]) / 1e9 == pytest.approx(billions, rel=2e-3)


def test_what_a_device_holds(plan_of_kind):
    lora, nf4, full = (plan_of_kind[kind] for kind in plans.KINDS)
    assert full.base < 0.05 * lora.base
    assert full.trained == pytest.approx(lora.base, rel=0.02)
    assert full.optimizer == pytest.approx(2 * full.trained, rel=0.01)
    assert lora.optimizer == pytest.approx(2 * lora.trained, rel=0.01)
    assert lora.trained < 0.5 * lora.base
    assert nf4.trained == lora.trained
    # The embedding and the head, which are not quantised, are a quarter of this small model.
    assert nf4.base < 0.5 * lora.base
    assert lora.total < full.total
    assert lora.flops_per_token < full.flops_per_token
    # Two operations for each weight forward, twice because of remat, and two for inputs' gradients.
    weights = parameter_count(CONFIG) - CONFIG.vocab_size * CONFIG.hidden_size
    assert 6 * weights < lora.flops_per_token < 9 * weights


def test_a_device_works_on_no_example_of_others(plan_of_kind):
    """With twice the examples on twice the devices, it holds hardly more, and computes no more."""
    half = plans.plan_of(dataclasses.replace(TASK, devices=4))
    whole = plan_of_kind[plans.LORA]
    assert whole.temporaries <= 1.25 * half.temporaries
    assert whole.flops_per_token == half.flops_per_token


def test_the_smallest_slice_is_the_first_that_the_step_fits(monkeypatch):
    tried = []

    def plan_of(task):
        tried.append(task.devices)
        if task.devices == 8:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in hbm")
        return dataclasses.replace(PLAN, temporaries=10 * 2**40 if task.devices == 16 else 0)

    monkeypatch.setattr(plans, "plan_of", plan_of)
    monkeypatch.setattr(plans, "_held_bytes", lambda task: 2**50 if task.devices == 4 else 0)
    task = dataclasses.replace(TASK, machine="tpu-v5e", devices=2)
    found, plan = plans.smallest_plan(task)
    assert tried == [8, 16, 32]
    assert found.devices == 32
    assert plan.fits("tpu-v5e")
    monkeypatch.setattr(plans, "_held_bytes", lambda task: 2**50)
    assert plans.smallest_plan(task) is None


def test_an_error_of_the_compiler_is_no_lack_of_memory(monkeypatch):
    def plan_of(task):
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    monkeypatch.setattr(plans, "plan_of", plan_of)
    monkeypatch.setattr(plans, "_held_bytes", lambda task: 0)
    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
        plans.smallest_plan(dataclasses.replace(TASK, machine="tpu-v5e"))


@pytest.mark.parametrize("kind", [plans.LORA, plans.NF4])
def test_more_devices_hold_less_each(kind):
    held = []
    for devices in (2, 4, 8):
        task = dataclasses.replace(TASK, kind=kind, devices=devices)
        _, arguments = plans.program(task, plans.on_mesh(task))
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
  %f1 = f32[16]{0} fusion(%x), kind=kCustom, calls=%started
  %f2 = f32[16]{0} while(%f1), condition=%condition, body=%beside
  %f3 = f32[16]{0} fusion(%f2), kind=kCustom, calls=%done
}
"""
    # One collective that is spread over two fusions and a loop between them.
    for name in ("started", "beside", "done"):
        text = f"""
%{name} (p: f32[4]) -> f32[16] {{
  %t = f32[16]{{0}} all-to-all(%p), channel_id=7, frontend_attributes={{chain_id="2"}}
}}
{text}"""
    found = {kind: (each.count, each.bytes) for kind, each in collectives(text).items()}
    assert found == {
        "all-gather": (16, 8 * 64),
        "all-reduce": (1, 2 * 6 + 4 * 5),
        "collective-permute": (1, 28),
        "all-to-all": (1, 64),
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
        (["--tensor", "3", "--devices", "8"], "--tensor 3 does not divide 8 devices"),
        (
            ["--tensor", "16", "--devices", "16"],
            "does not divide the 8 heads of keys of llama-3.1-8b",
        ),
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
    assert "llama-3.1-8b" in shown
    assert "TFLOP/token" in shown
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["commands"][0].startswith("python -m benchmarks.scale --kind lora")
    assert "jax" in written["versions"]
    assert [row["kind"] for row in written["plans"]] == ["lora", "nf4"]
    assert written["plans"][0]["total"] == plan_of_kind["lora"].total
    assert (tmp_path / "plan.png").stat().st_size > 1_000


def test_what_was_written_becomes_tables(tmp_path):
    tasks = [
        dataclasses.replace(TASK, machine=machine, kind=kind)
        for machine, kind in (("tpu-v5e", "lora"), ("tpu-v5p", "lora"), ("tpu-v5p", "full"))
    ]
    rows = [(task, PLAN) for task in tasks]
    (tmp_path / "plan.json").write_text(json.dumps(report.all_numbers(rows)))
    assert report.read_rows(tmp_path / "plan.json") == rows
    slices, sent = report.tables(rows)
    assert slices.rows[0] == ["small", "lora", "0.051", "8 × 6.5 GiB", "8 × 6.5 GiB"]
    assert slices.rows[1] == ["small", "full", "0.051", "", "8 × 6.5 GiB"]
    assert sent.rows[0] == ["small", "lora", "8 tpu-v5e", "5 all-gather 2.0 GiB"]


@pytest.mark.parametrize("content", [None, "{", "{}", '{"plans": [{}]}', '{"plans": 1}'])
def test_a_file_without_plans_is_refused(content, tmp_path):
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match="is no file of plans, such as --json writes"):
        report.read_rows(path)
