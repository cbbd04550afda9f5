"""The study on images with a tiny U-Net: what it draws, writes, claims and refuses."""

import dataclasses
import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from experiments.common.errors import InputError
from experiments.image_lora import main
from experiments.images import classifier, study, training
from experiments.images.drawing import at_strength
from experiments.images.options import BaseOptions
from experiments.images.task import FOLDED, SIDE, folded, unet_config, unfolded
from experiments.images.training import Batches
from experiments.models.unet import Schedule, shapes_of
from tests.experiments.interruptions import interrupted_after
from tests.tiny_bert import write_model

pytestmark = pytest.mark.slow

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

SMALL = [
    *("--data", "digits", "--channels", "8", "--base-steps", "4", "--base-batch", "4"),
    *("--steps", "2", "--batch-size", "4", "--examples", "4", "--drawn", "2"),
    *("--sampling-steps", "2", "--strengths", "0", "1", "--rank", "2"),
]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    model = write_model(tmp_path_factory.mktemp("encoder") / "model")
    return [*SMALL, "--model", str(model)]


@pytest.fixture(scope="module", autouse=True)
def quick_classifier():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "_STEPS", 4)
        yield


@pytest.fixture(scope="module")
def out(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    assert main([*arguments, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def metrics(out):
    return json.loads((out / "metrics.json").read_text())


def test_every_way_to_draw_is_judged(metrics):
    names = {
        "the base",
        *(f"LoRA of {digit}, strength {strength}" for digit in (7, 4) for strength in (0, 1)),
        "tuned in full on 7",
        "tuned in full on 4",
        "all adapters as one",
    }
    assert set(metrics["recognised"]) == names
    for shares in metrics["recognised"].values():
        assert set(shares) == set(map(str, range(10)))
        assert all(0 <= share <= 1 for share in shares.values())


def test_what_it_costs(metrics):
    for costs in metrics["costs"].values():
        assert costs["full"]["trainable"] == metrics["base_parameters"]
        assert costs["lora"]["trainable"] < costs["full"]["trainable"]
        assert costs["lora"]["step_bytes"] > 0


def test_a_batch_of_several_adapters_draws_what_each_draws(metrics):
    assert metrics["served_difference"] < 1e-3


def test_pictures_and_adapters_are_written(out):
    assert (out / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "base.png").read_bytes().startswith(b"\x89PNG")
    for digit in (7, 4):
        names = {path.name for path in (out / f"adapter_{digit}").iterdir()}
        assert names == {"orbax", "pytorch_lora_weights.safetensors", "kohya.safetensors"}


def test_a_second_run_takes_no_step(arguments, out, metrics, monkeypatch, capsys):
    def no_step(self, batch):
        raise AssertionError("a step")

    monkeypatch.setattr(training.Training, "taken", no_step)
    assert main([*arguments, "--no-plots", "--json", "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["recognised"] == metrics["recognised"]


def test_an_interrupted_base_goes_on(arguments, tmp_path, monkeypatch, error_of):
    options = [*arguments, "--no-plots", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        interrupted_after(training.Training, 3, patch)
        assert main(options) == 130
    steps = []
    taken = training.Training.taken

    def counted(self, batch):
        steps.append(self.step)
        return taken(self, batch)

    def enough(self, base, digit):
        raise InputError(f"the base has {self._options.base.base_steps} steps")

    monkeypatch.setattr(training.Training, "taken", counted)
    monkeypatch.setattr(study._Study, "_tuned", enough)
    assert "the base has 4 steps" in error_of(main, options)
    assert steps == [3]


def test_strength_multiplies_the_change():
    params = {"kernel": np.ones((4, 3), np.float32)}
    wrapped = lora_jax.wrap(params, "kernel", rank=2)
    wrapped["kernel"] = dataclasses.replace(wrapped["kernel"], lora_B=wrapped["kernel"].lora_B + 1)
    change = lora_jax.merge(wrapped)["kernel"] - params["kernel"]
    half = lora_jax.merge(at_strength(wrapped, 0.5))["kernel"] - params["kernel"]
    np.testing.assert_allclose(half, 0.5 * change, rtol=1e-5, atol=1e-6)


def test_squares_of_pixels_are_the_channels_of_a_place():
    pictures = np.random.default_rng(0).standard_normal((3, SIDE, SIDE, 1)).astype(np.float32)
    places = folded(pictures)
    assert places.shape == (3, *FOLDED)
    np.testing.assert_array_equal(places[1, 4, 6].reshape(2, 2), pictures[1, 8:10, 12:14, 0])
    np.testing.assert_array_equal(unfolded(places), pictures)


def test_the_network_has_attention_but_at_the_finest_resolution():
    shapes = shapes_of(unet_config((8, 16, 16), 12))
    with_attention = {
        name for name, block in shapes.items() if any("attentions" in each for each in block)
    }
    assert with_attention == {
        *("down_blocks_1", "down_blocks_2", "mid_block", "up_blocks_0", "up_blocks_1"),
    }


def test_batches_are_the_same_each_time_and_others_at_each_step():
    task = SimpleNamespace(
        pictures=np.random.default_rng(0).standard_normal((6, SIDE, SIDE, 1)).astype(np.float32),
        labels=np.arange(6),
        schedule=Schedule(),
        captions=SimpleNamespace(encoded=jnp.ones((10, 2, 3, 4)), empty=jnp.zeros((1, 3, 4))),
    )
    batches = Batches(task, np.arange(6), size=5, drop=0.5, seed=1)
    first, again, other = batches[0], batches[0], batches[1]
    for one, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, same)
    assert not np.array_equal(first.noised, other.noised)
    dropped = np.asarray(first.text).max(axis=(1, 2)) == 0
    assert set(np.asarray(first.text).max(axis=(1, 2))[~dropped]) <= {1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": (7, 7)}, "names a digit twice"),
        ({"held_out": tuple(range(10))}, "leave at least one"),
        ({"channels": (10, 16)}, "multiples of 8"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        BaseOptions(**options).check()


def test_wrong_arguments(capsys):
    assert main(["--held-out", "12"]) == 2
    assert "invalid choice" in capsys.readouterr().err
