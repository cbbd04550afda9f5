"""Fine-tunes a pretrained network on the digit it knows least, and checks what LoRA claims."""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

import lora_jax
from experiments.common.claims import frozen_unchanged, max_weight_error
from experiments.common.console import Console
from experiments.common.errors import exit_code
from experiments.common.evaluation import evaluate
from experiments.common.files import bytes_in
from experiments.common.run import Run
from experiments.common.stores import BaseCheckpoint
from experiments.common.timing import milliseconds
from experiments.common.training import ApplyFn
from experiments.data.dataset import Dataset
from experiments.mnist.network import ADAPTED_APPLY, NETWORK, check_adapters_fit
from experiments.mnist.options import Options, parsed
from experiments.mnist.report import Findings, present
from experiments.mnist.task import base_settings, digit_to_tune, finetuned, pretrained

_STANDARD_NORMAL = functools.partial(lora_jax.init.gaussian, standard_deviation=1.0)
_INFERENCE_BATCH = 100
_INFERENCE_ROUNDS = 100


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study with these arguments and returns the exit code of the process."""
    return exit_code(lambda: study(parsed(argv)))


def study(options: Options) -> None:
    """Pretrains a network, fine-tunes adapters on one digit, and reports on every claim."""
    run = Run(options.output)
    console, training, out = run.console, options.training, options.output.out
    check_adapters_fit(functools.partial(with_adapters, options=options))
    dataset = options.data.loaded(console)
    run.phase_ended("data")

    base_checkpoint = BaseCheckpoint(out / "base_checkpoint", base_settings(training, dataset))
    base = pretrained(dataset, base_checkpoint, training, console)
    run.phase_ended("pretraining")

    test = functools.partial(evaluate, examples=dataset.test, console=console)
    before = test(NETWORK.apply, base.params, description="Testing the base")
    digit = digit_to_tune(before, training, console)
    run.phase_ended("testing")

    clone = jax.tree.map(np.array, base.params)
    tuned = finetuned(
        with_adapters(base.params, options),
        lora_jax.optimizer(optax.adam(training.learning_rate)),
        digit,
        dataset,
        training,
        random=np.random.default_rng((training.seed, 1)),
        console=console,
    )
    merged = lora_jax.merge(tuned.params)
    run.phase_ended("finetuning")

    adapter_folder = out / "adapter_checkpoint"
    lora_jax.save(adapter_folder, tuned.params, overwrite=True)
    restored = lora_jax.restore(adapter_folder, base_checkpoint.read().params)
    run.phase_ended("checkpoints")

    networks: dict[str, tuple[ApplyFn, Any]] = {
        "adapted": (ADAPTED_APPLY, tuned.params),
        "disabled": (NETWORK.apply, lora_jax.unwrap(tuned.params)),
        "merged": (NETWORK.apply, merged),
        "restored": (ADAPTED_APPLY, restored),
    }
    evaluations = {
        name: test(apply_fn, params, description=f"Testing {name}")
        for name, (apply_fn, params) in networks.items()
    }
    run.phase_ended("testing")
    times = _inference_milliseconds(
        {"base": (NETWORK.apply, base.params), **networks}, dataset, console
    )
    run.phase_ended("timing")

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
    present(findings, options, run)


def with_adapters(params: Any, options: Options) -> Any:
    """Returns `params` wrapped as this study does it: lora_A from N(0, 1), lora_B zero."""
    return options.adapters.wrapped(params, seed=options.training.seed, init=_STANDARD_NORMAL)


def _inference_milliseconds(
    networks: dict[str, tuple[ApplyFn, Any]], dataset: Dataset, console: Console
) -> dict[str, float]:
    """Returns the time of one batch of images, with adapters and without."""
    images = jax.device_put(dataset.test.inputs[:_INFERENCE_BATCH])
    computations = {}
    for name in ("base", "adapted", "merged"):
        apply_fn, params = networks[name]
        computations[name] = functools.partial(jax.jit(apply_fn), {"params": params}, images)
    return milliseconds(
        computations, _INFERENCE_ROUNDS, console=console, description="Timing inference"
    )


if __name__ == "__main__":
    sys.exit(main())
