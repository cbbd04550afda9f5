"""Profiles of steps are divided into kinds of operations, of which no second counts twice."""

import json
from collections import Counter

import jax
import pytest

from benchmarks import peft_profile
from benchmarks.peers import xla_profile
from benchmarks.peers.llm_jax import LoraJax
from benchmarks.peers.xla_profile import (
    ATTENTION,
    FACTORS,
    HEAD,
    KINDS,
    OTHERS,
    WEIGHTS,
    kind_of,
)
from experiments.common.errors import InputError
from tests.experiments.small_llm_study import write_study

PREFIX = "jit(step)/transpose(jvp(Llama.hidden_states/Llama._run))/while/body/checkpoint"


@pytest.mark.parametrize(
    ("op_name", "kind"),
    [
        ("layers/mlp/gate/dot_general", WEIGHTS),
        ("layers/attention/attention._heads/key/dot_general", WEIGHTS),
        ("layers/attention/out/dot_general", WEIGHTS),
        ("rematted_computation/jvp(layers/mlp/gate)/lora/dot_general", FACTORS),
        ("jvp(layers/attention/attention._heads/key)/lora/add", FACTORS),
        ("layers/attention/bkrd,bksd->bkrs/dot_general", ATTENTION),
        ("layers/attention/checkpoint/reduce_max", ATTENTION),
        ("layers/mlp/checkpoint/jit(silu)/div", OTHERS),
        ("layers/norm/mul", OTHERS),
    ],
)
def test_the_modules_of_an_operation_say_its_kind(op_name, kind):
    assert kind_of(f"{PREFIX}/{op_name}") == kind


@pytest.mark.parametrize(
    "op_name",
    ["transpose(jvp(Llama.logits))/embed.attend/dot_general", "jvp(jit(take_along_axis))/gather"],
)
def test_what_comes_after_the_layers_is_the_head(op_name):
    assert kind_of(f"jit(step)/while/body/closed_call/{op_name}") == HEAD


def test_operations_that_run_at_once_share_the_clock():
    def ran(name, start, end):
        return [(start * 1e9, 1, name), (end * 1e9, -1, name)]

    changes = [
        *ran("product", 0, 4),
        *ran("product", 1, 4),
        *ran("sum", 6, 10),
        *ran("product", 7, 9),
        *ran("nothing", 9, 9),
    ]
    assert xla_profile.shared_seconds(changes) == Counter(product=5, sum=3)


@pytest.mark.parametrize(
    ("name", "shapes", "kind"),
    [
        ("mm", [[64, 96], [96, 64]], WEIGHTS),
        ("addmm", [[96], [50, 64], [64, 96]], WEIGHTS),
        ("mm", [[50, 64], [64, 8]], FACTORS),
        ("t", [[8, 64]], FACTORS),
        ("_scaled_dot_product_flash_attention_for_cpu", [[2, 4, 25, 16]], ATTENTION),
        ("mm", [[12, 64], [64, 300]], HEAD),
        ("_log_softmax", [[12, 300]], HEAD),
        ("mul", [[50, 64]], OTHERS),
        ("mul", [[64, 96]], OTHERS),
    ],
)
def test_the_sizes_of_what_pytorch_takes_say_the_kind_of_an_operation(name, shapes, kind):
    pytest.importorskip("torch")
    from benchmarks.peers.torch_profile import Sizes

    assert Sizes(frozen={(64, 96)}, rank=8, vocabulary=300).kind_of(name, shapes) == kind


def test_steps_elsewhere_than_on_a_cpu_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(InputError, match="on a CPU alone; JAX_PLATFORMS=cpu"):
        LoraJax.profile(LoraJax.__new__(LoraJax), first=0, count=1)


@pytest.fixture
def peers(promoted_ranks):
    """Skips a test where PEFT's side can't run."""
    for package in ("torch", "peft", "transformers"):
        pytest.importorskip(package)


@pytest.mark.slow
@pytest.mark.usefixtures("peers")
def test_both_sides_spend_time_in_every_kind(tmp_path, capsys):
    file = tmp_path / "profile.json"
    arguments = ["--steps", "3", "--threads", "1", "--json", str(file), "--"]
    assert peft_profile.main([*arguments, *write_study(tmp_path)]) == 0
    assert "PEFT, checkpointing" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["steps"] == 3
    assert {"jax", "torch", "peft"} <= set(found["versions"])
    assert len(found["contenders"]) == 4
    for contender in found["contenders"].values():
        assert set(contender["seconds"]) == set(KINDS)
        assert min(contender["seconds"].values()) > 0


@pytest.mark.slow
@pytest.mark.usefixtures("peers")
def test_a_training_of_too_few_steps_is_refused(tmp_path, capsys):
    study = [*write_study(tmp_path), "--train-examples", "4", "--epochs", "1"]
    assert peft_profile.main(["--threads", "1", "--", *study]) == 2
    assert "steps of the training: 1; expected more than the 2" in capsys.readouterr().err
