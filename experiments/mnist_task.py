"""The task of the MNIST studies: a network, its pretraining, and fine-tuning on one digit."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

import lora_jax
from experiments.base_checkpoint import BaseCheckpoint
from experiments.console import Console
from experiments.data import Dataset, digit_batches, epoch_batches
from experiments.data.dataset import CLASSES, PIXELS
from experiments.evaluation import Evaluation
from experiments.models import MLP, normalised
from experiments.task_options import TaskOptions
from experiments.training import Trained, train

NETWORK = MLP(hidden=(1000, 2000), classes=CLASSES, preprocess=normalised)
LAYERS = ("hidden_1", "hidden_2", "output")
# One function for all uses: what was compiled for it is found again.
ADAPTED_APPLY = lora_jax.adapt(NETWORK.apply)


def initial_params(seed: int) -> Any:
    """Returns the network's parameters before any training."""
    return jax.jit(NETWORK.init)(jax.random.key(seed), np.zeros((1, PIXELS), np.uint8))["params"]


def check_adapters_fit(wrapped: Callable[[Any], Any]) -> None:
    """Raises what `wrap` has against its arguments from shapes alone, and not after training.

    Args:
      wrapped: a function from the network's params to wrapped ones.
    """
    jax.eval_shape(wrapped, jax.eval_shape(initial_params, 0))


def base_settings(options: TaskOptions, dataset: Dataset) -> dict[str, Any]:
    """Returns all that decides the numbers of the pretrained network."""
    return {
        "dataset": dataset.name,
        "hidden": list(NETWORK.hidden),
        "seed": options.seed,
        "batch_size": options.batch_size,
        "epochs": options.pretrain_epochs,
        "learning_rate": options.learning_rate,
    }


def pretrained(
    dataset: Dataset,
    checkpoint: BaseCheckpoint,
    options: TaskOptions,
    console: Console,
    *,
    others: Sequence[BaseCheckpoint] = (),
) -> Trained:
    """Returns the base network: from an earlier run of the same settings, or trained now.

    Args:
      dataset: what to train on.
      checkpoint: where an earlier run may have left it, and where it goes when trained.
      options: how to train.
      console: what takes time is told here.
      others: where else it may be.
    """
    for candidate in () if options.retrain else (checkpoint, *others):
        if earlier := candidate.load(console):
            console.note(
                f"Base network: reused from {candidate.folder} (--retrain trains it again)"
            )
            return earlier
    batches = epoch_batches(
        dataset.train,
        batch_size=options.batch_size,
        epochs=options.pretrain_epochs,
        random=np.random.default_rng((options.seed, 0)),
    )
    trained = train(
        NETWORK.apply,
        initial_params(options.seed),
        optax.adam(options.learning_rate),
        batches,
        console=console,
        description="Pretraining",
    )
    checkpoint.save(trained)
    return trained


def digit_to_tune(base: Evaluation, options: TaskOptions, console: Console) -> int:
    """Returns the digit that the caller chose, or else the one that the base gets wrong most."""
    wrong_counts = base.wrong_counts(CLASSES)
    digit = int(np.argmax(wrong_counts)) if options.digit is None else options.digit
    console.note(f"Fine-tuning on digit {digit}: wrong {wrong_counts[digit]} times")
    return digit


def finetuned(
    wrapped: Any,
    tx: optax.GradientTransformation,
    digit: int,
    dataset: Dataset,
    options: TaskOptions,
    *,
    random: np.random.Generator,
    console: Console,
) -> Trained:
    """Returns `wrapped` with the adapters trained on the digit."""
    batches = digit_batches(
        dataset.train,
        digit,
        batch_size=options.batch_size,
        batches=options.finetune_batches,
        replay=options.replay,
        random=random,
    )
    return train(ADAPTED_APPLY, wrapped, tx, batches, console=console, description="Fine-tuning")
