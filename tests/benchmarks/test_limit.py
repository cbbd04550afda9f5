"""The steps that `benchmarks.limit` compares, on small layers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from benchmarks import limit
from benchmarks.limit import ADAPT, BY_HAND, LIMIT, main, steps_of
from benchmarks.limit_models import FEED_FORWARD, llama
from benchmarks.limit_study import language_model, packed_batch
from benchmarks.llama_layers import Sizes
from benchmarks.models import floats
from benchmarks.programs import SCALE, Cost
from experiments.llm.objectives import Answers
from experiments.models.llama import Llama
from tests import tiny_llama
from tests.agreement import assert_agree
from tests.arrays import random

LLAMA = llama(
    Sizes(layers=2, embed=96, hidden=256, heads=3, kv_heads=1),
    examples=8,
    length=64,
    dtype=jnp.float32,
    remat=False,
)
SMALLER = dataclasses.replace(
    FEED_FORWARD,
    params={"up": floats(2, 64, 96), "down": floats(2, 96, 64)},
    inputs=floats(512, 64),
)


CONFIG = tiny_llama.config("qwen3")
BATCH = packed_batch(tiny_llama.VOCABULARY, rows=8, length=64, examples=(30, 20), learned=6)


def study():
    """Returns the study on language models, its network tiny."""
    return language_model("study", CONFIG, BATCH, remat=True)


MODELS = {"llama": lambda: LLAMA, "feed-forward": lambda: SMALLER, "study": study}
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimised", "promoted_ranks")]


def array(leaf):
    """Returns an array of a shape; a number is the scale that is written into steps by hand."""
    if not leaf.shape:
        return jnp.float32(SCALE)
    return random(*leaf.shape) / max(leaf.shape) ** 0.5


@pytest.mark.parametrize("name", MODELS)
def test_both_steps_compute_the_same(name):
    steps = steps_of(dataclasses.replace(MODELS[name](), rank=4), jnp.float32)
    results = [
        jax.jit(steps[each].function)(*jax.tree.map(array, steps[each].arguments))
        for each in (BY_HAND, ADAPT)
    ]
    assert_agree(*results, tolerance=1e-4)


def test_the_gradients_are_those_that_the_study_trains_with():
    step = steps_of(study(), jnp.float32)[ADAPT]
    adapters, _, frozen = jax.tree.map(array, step.arguments)
    embedded = frozen["embed"]["embedding"][BATCH.tokens]

    def loss(adapters):
        wrapped = lora_jax.combine(adapters, frozen)
        return Answers().sums(Llama(CONFIG).apply, wrapped, None, BATCH)["loss"]

    found, _ = jax.jit(step.function)(adapters, embedded, frozen)
    assert_agree(found, jax.jit(jax.grad(loss))(adapters), tolerance=1e-4)


@pytest.mark.parametrize("rank", [4, 16])
def test_a_step_costs_less_than_one_written_by_hand(rank):
    steps = steps_of(dataclasses.replace(LLAMA, rank=rank), jnp.float32)
    cost = {name: Cost.of(step.lowered().compile()) for name, step in steps.items()}
    assert cost[LIMIT].flops < cost[ADAPT].flops < cost[BY_HAND].flops
    assert cost[LIMIT].bytes < cost[ADAPT].bytes < cost[BY_HAND].bytes
    assert cost[ADAPT].temporary_bytes <= 1.05 * cost[BY_HAND].temporary_bytes


def test_the_command(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(limit.TIMED, "feed-forward", lambda: SMALLER)
    file = tmp_path / "limit.json"
    arguments = ["--model", "feed-forward", "--rank", "4", "--rounds", "2", "--json", str(file)]
    assert main(arguments) == 0
    assert "by hand" in capsys.readouterr().out
    steps = json.loads(file.read_text())["steps"]
    assert [each["step"] for each in steps] == [LIMIT, BY_HAND, ADAPT]
    assert steps[0]["of_limit"] == 1


@pytest.mark.parametrize("arguments", [["--rank", "0"], ["--model", "?"], ["--machine", "h100"]])
def test_wrong_arguments(arguments, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert arguments[0] in error
    assert len(error.splitlines()) == 1
