"""The task of the MNIST studies: pretraining a network, and fine-tuning it on one digit."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import optax

from experiments.common.console import Console
from experiments.common.evaluation import Evaluation
from experiments.common.stores import BaseCheckpoint
from experiments.common.training import Trained, train
from experiments.data.batches import digit_batches, epoch_batches
from experiments.data.dataset import Dataset
from experiments.data.images import CLASSES
from experiments.mnist.network import ADAPTED_APPLY, NETWORK, initial_params
from experiments.mnist.options import TrainingOptions


def base_settings(training: TrainingOptions, dataset: Dataset) -> dict[str, Any]:
    """Returns everything that decides the numbers of the pretrained network."""
    return {
        "dataset": dataset.name,
        "hidden": list(NETWORK.hidden),
        "seed": training.seed,
        "batch_size": training.batch_size,
        "epochs": training.pretrain_epochs,
        "learning_rate": training.learning_rate,
    }


def pretrained(
    dataset: Dataset,
    checkpoint: BaseCheckpoint,
    training: TrainingOptions,
    console: Console,
    *,
    others: Sequence[BaseCheckpoint] = (),
) -> Trained:
    """Returns the base network: that of an earlier run with the same settings, or a new one.

    Args:
      dataset: what to train on.
      checkpoint: where an earlier run may have left it, and where a new one is saved.
      training: how to train.
      console: where progress is shown.
      others: where else it may be.
    """
    for candidate in () if training.retrain else (checkpoint, *others):
        if earlier := candidate.load(console):
            console.note(
                f"Base network: reused from {candidate.folder} (--retrain trains it again)"
            )
            return earlier
    batches = epoch_batches(
        dataset.train,
        batch_size=training.batch_size,
        epochs=training.pretrain_epochs,
        random=np.random.default_rng((training.seed, 0)),
    )
    trained = train(
        NETWORK.apply,
        initial_params(training.seed),
        optax.adam(training.learning_rate),
        batches,
        console=console,
        description="Pretraining",
    )
    checkpoint.save(trained)
    return trained


def digit_to_tune(base: Evaluation, training: TrainingOptions, console: Console) -> int:
    """Returns the digit that the caller chose, or else the one the base gets wrong most often."""
    wrong_counts = base.wrong_counts(CLASSES)
    digit = int(np.argmax(wrong_counts)) if training.digit is None else training.digit
    console.note(f"Fine-tuning on digit {digit}: wrong {wrong_counts[digit]} times")
    return digit


def finetuned(
    wrapped: Any,
    tx: optax.GradientTransformation,
    digit: int,
    dataset: Dataset,
    training: TrainingOptions,
    *,
    random: np.random.Generator,
    console: Console,
) -> Trained:
    """Returns `wrapped` with adapters that are trained on the digit."""
    batches = digit_batches(
        dataset.train,
        digit,
        batch_size=training.batch_size,
        batches=training.finetune_batches,
        replay=training.replay,
        random=random,
    )
    return train(ADAPTED_APPLY, wrapped, tx, batches, console=console, description="Fine-tuning")
