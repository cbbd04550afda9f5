"""Fine-tunes a pretrained network on the digit that it knows least, and checks what LoRA claims."""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

import lora_jax
from experiments.base_checkpoint import BaseCheckpoint
from experiments.claims import frozen_unchanged, max_weight_error
from experiments.command import exit_code
from experiments.console import Console, device_line
from experiments.data import Dataset, digit_batches, epoch_batches, load
from experiments.data.dataset import CLASSES, PIXELS
from experiments.errors import InputError
from experiments.evaluation import evaluate
from experiments.mnist_options import Options, parsed
from experiments.mnist_report import Findings, present
from experiments.models import MLP, normalised
from experiments.output import bytes_in, writable_folder
from experiments.timing import Stopwatch, milliseconds
from experiments.training import ApplyFn, Trained, train

NETWORK = MLP(hidden=(1000, 2000), classes=CLASSES, preprocess=normalised)

_STANDARD_NORMAL = functools.partial(lora_jax.init.gaussian, standard_deviation=1.0)
_INFERENCE_BATCH = 100
_INFERENCE_ROUNDS = 100


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study with these arguments and returns the exit code of the process."""
    return exit_code(lambda: study(parsed(argv)))


def study(options: Options) -> None:
    """Pretrains a network, fine-tunes adapters on one digit, and reports on every claim."""
    console = Console(to_stderr=options.json)
    console.note(device_line())
    out = writable_folder(options.out, "--out")
    watch = Stopwatch()
    _check_adapters_fit(options)
    dataset = load(options.data, options.data_dir, options.mnist_dir, console)
    watch.phase_ended("data")

    base_checkpoint = BaseCheckpoint(out / "base_checkpoint", _base_settings(options, dataset))
    base = _pretrained(dataset, base_checkpoint, options, console)
    watch.phase_ended("pretraining")

    test = functools.partial(evaluate, split=dataset.test, console=console)
    before = test(NETWORK.apply, base.params, description="Testing the base")
    digit = options.digit
    if digit is None:
        digit = int(np.argmax(before.wrong_counts(CLASSES)))
    console.note(f"Fine-tuning on digit {digit}: wrong {before.wrong_counts(CLASSES)[digit]} times")
    watch.phase_ended("testing")

    clone = jax.tree.map(np.array, base.params)
    tuned = _finetuned(base.params, digit, dataset, options, console)
    merged = lora_jax.merge(tuned.params)
    watch.phase_ended("finetuning")

    adapter_folder = out / "adapter_checkpoint"
    lora_jax.save(adapter_folder, tuned.params, overwrite=True)
    restored = lora_jax.restore(adapter_folder, base_checkpoint.read().params)
    watch.phase_ended("checkpoints")

    adapted_apply = lora_jax.adapt(NETWORK.apply)
    networks: dict[str, tuple[ApplyFn, Any]] = {
        "adapted": (adapted_apply, tuned.params),
        "disabled": (NETWORK.apply, lora_jax.unwrap(tuned.params)),
        "merged": (NETWORK.apply, merged),
        "restored": (adapted_apply, restored),
    }
    evaluations = {
        name: test(apply_fn, params, description=f"Testing {name}")
        for name, (apply_fn, params) in networks.items()
    }
    watch.phase_ended("testing")
    times = _inference_milliseconds(
        {"base": (NETWORK.apply, base.params), **networks}, dataset, console
    )
    watch.phase_ended("timing")

    findings = Findings(
        dataset=dataset.name,
        digit=digit,
        wrapped=tuned.params,
        evaluations={"base": before, **evaluations},
        frozen_unchanged=frozen_unchanged(clone, tuned.params),
        max_weight_error=max_weight_error(tuned.params, merged),
        bytes={"adapter": bytes_in(adapter_folder), "model": bytes_in(base_checkpoint.folder)},
        milliseconds=times,
        losses={"pretraining": base.losses, "fine-tuning": tuned.losses},
    )
    present(findings, options, watch, console)


def initial_params(seed: int) -> Any:
    """Returns the network's parameters before any training."""
    return jax.jit(NETWORK.init)(jax.random.key(seed), np.zeros((1, PIXELS), np.uint8))["params"]


def with_adapters(params: Any, options: Options) -> Any:
    """Returns `params` wrapped as this study does it: lora_A from N(0, 1), lora_B zero."""
    try:
        return lora_jax.wrap(
            params,
            options.targets,
            rank=options.rank,
            alpha=options.alpha,
            key=jax.random.key(options.seed),
            init=_STANDARD_NORMAL,
        )
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error


def _check_adapters_fit(options: Options) -> None:
    """Raises what `wrap` has against the options now, from shapes alone, and not after training."""
    params = jax.eval_shape(initial_params, options.seed)
    jax.eval_shape(functools.partial(with_adapters, options=options), params)


def _base_settings(options: Options, dataset: Dataset) -> dict[str, Any]:
    """Returns all that decides the numbers of the pretrained network."""
    return {
        "dataset": dataset.name,
        "hidden": list(NETWORK.hidden),
        "seed": options.seed,
        "batch_size": options.batch_size,
        "epochs": options.pretrain_epochs,
        "learning_rate": options.learning_rate,
    }


def _pretrained(
    dataset: Dataset,
    checkpoint: BaseCheckpoint,
    options: Options,
    console: Console,
) -> Trained:
    """Returns the base network: from an earlier run of the same settings, or trained now."""
    if not options.retrain and (earlier := checkpoint.load(console)):
        console.note(f"Base network: reused from {checkpoint.folder} (--retrain trains it again)")
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


def _finetuned(
    params: Any, digit: int, dataset: Dataset, options: Options, console: Console
) -> Trained:
    """Returns `params` wrapped, with the adapters trained on the digit."""
    batches = digit_batches(
        dataset.train,
        digit,
        batch_size=options.batch_size,
        batches=options.finetune_batches,
        replay=options.replay,
        random=np.random.default_rng((options.seed, 1)),
    )
    return train(
        lora_jax.adapt(NETWORK.apply),
        with_adapters(params, options),
        lora_jax.optimizer(optax.adam(options.learning_rate)),
        batches,
        console=console,
        description="Fine-tuning",
    )


def _inference_milliseconds(
    networks: dict[str, tuple[ApplyFn, Any]], dataset: Dataset, console: Console
) -> dict[str, float]:
    """Returns the time of one batch of images, with adapters and without."""
    images = jax.device_put(dataset.test.inputs[:_INFERENCE_BATCH])
    computations = {}
    for name in ("base", "adapted", "merged"):
        apply_fn, params = networks[name]
        computations[name] = functools.partial(jax.jit(apply_fn), {"params": params}, images)
    return milliseconds(computations, _INFERENCE_ROUNDS, console=console)


if __name__ == "__main__":
    sys.exit(main())
