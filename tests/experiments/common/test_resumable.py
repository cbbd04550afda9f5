"""A training that is interrupted within a step and goes on as if nothing had happened."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from experiments.common.errors import InputError
from experiments.common.resumable import History, ResumableTraining
from lora_jax.checkpoint import TrainingCheckpoints
from tests.experiments.interruptions import interrupted_after

TOTAL = 7


class Line(ResumableTraining):
    """Fits a line to rows of numbers, which are drawn for each step."""

    def __init__(self, *, rate=0.1, data=0):
        params = {"w": jnp.ones((3, 2))}
        wrapped = lora_jax.wrap(params, "w", rank=1, key=jax.random.key(0))
        self._tx, self._data = optax.adam(rate), data
        super().__init__(wrapped, self._tx, evaluate_every=3, settings={"rate": rate})

    @property
    def total(self):
        return TOTAL

    def batches_left(self):
        numbers = range(self.step, self.total)
        return (np.random.default_rng((self._data, n)).normal(size=(4, 3)) for n in numbers)

    def taken(self, batch):
        def loss(trainable):
            tree = lora_jax.combine(trainable, self._frozen)
            apply = lora_jax.adapt(lambda tree, x: x @ tree["w"])
            return jnp.mean(apply(tree, jnp.asarray(batch, jnp.float32)) ** 2)

        value, gradients = jax.value_and_grad(loss)(self._trainable)
        updates, state = self._tx.update(gradients, self._state, self._trainable)
        return optax.apply_updates(self._trainable, updates), state, {"loss": value}

    def goodness(self, evaluation):
        return (-evaluation["loss"],)

    def progress_note(self):
        return f"loss {self.history.recent('loss')}"

    def described(self, evaluation):
        return f"loss {evaluation['loss']}"

    def position(self):
        return self._data

    def check_position(self, position):
        if position != self._data:
            raise InputError("other data")


def run(training, console, checkpoints=None, kept=None):
    def examine(wrapped):
        return {"loss": float(jnp.sum(lora_jax.merge(wrapped)["w"] ** 2))}

    keep = (lambda wrapped: None) if kept is None else kept.append
    training.run(examine, keep, console=console, checkpoints=checkpoints)


def state(training):
    history = {**training.history.steps, "seconds": None}
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(training.wrapped)]
    return leaves, history, training.history.evaluations


def test_an_interrupted_training_goes_on_to_the_bit(console, tmp_path, monkeypatch):
    whole = Line()
    run(whole, console)
    assert [found["step"] for found in whole.history.evaluations] == [3, 6, 7]
    assert whole.step == len(whole.history.of("loss")) == TOTAL
    with TrainingCheckpoints(tmp_path, keep=1) as checkpoints:
        broken = Line()
        with monkeypatch.context() as patch:
            interrupted_after(Line, 4, patch)
            with pytest.raises(KeyboardInterrupt):
                run(broken, console, checkpoints)
        again = Line()
        again.begin(checkpoints, resume=True, console=console)
        assert again.step == 4
        run(again, console, checkpoints)
    assert state(again) == state(whole)


def test_the_best_is_kept(console):
    training, kept = Line(), []
    run(training, console, kept=kept)
    losses = [found["loss"] for found in training.history.evaluations]
    better = sum(loss < min(losses[:n], default=np.inf) for n, loss in enumerate(losses))
    assert len(kept) == better >= 1
    assert training.best["loss"] == min(losses)


def test_what_does_not_continue(console, tmp_path):
    with TrainingCheckpoints(tmp_path, keep=1) as checkpoints:
        with pytest.raises(InputError, match="--resume finds no checkpoint"):
            Line().begin(checkpoints, resume=True, console=console)
        run(Line(), console, checkpoints)
        with pytest.raises(InputError, match="--rate is 0.2, but the training to continue has 0.1"):
            Line(rate=0.2).begin(checkpoints, resume=True, console=console)
        with pytest.raises(InputError, match="other data"):
            Line(data=1).begin(checkpoints, resume=True, console=console)
        Line().begin(checkpoints, resume=False, console=console)
        assert checkpoints.latest_step is None


def test_a_history_has_every_step():
    history = History()
    for value in range(3):
        history.add_step({"loss": value, "seconds": 0.5})
    assert history.of("loss") == [0, 1, 2]
    assert history.recent("seconds") == 0.5
    assert history.steps_per_second == 2
