"""One training on sentences, and the tests of what it gives."""

import jax

import lora_jax
from experiments.common.adapter_folder import file_hash
from experiments.common.claims import frozen_unchanged
from experiments.common.files import bytes_in
from experiments.common.memory import peak_bytes
from experiments.common.run import Run
from experiments.common.timing import timed
from experiments.models.bert import Encoder
from experiments.text.adapter_folder import AdapterFolder, Card
from experiments.text.evaluation import Examination
from experiments.text.methods import without_adapters
from experiments.text.options import Options
from experiments.text.report import Findings, present
from experiments.text.task import (
    TextTask,
    adapted_apply,
    describe,
    loaded_texts,
    shapes_line,
    text_task,
)
from experiments.text.training import Training
from lora_jax.checkpoint import TrainingCheckpoints

_CHECKPOINTS = "checkpoints"
_ADAPTER = "adapter"


def train_once(options: Options, run: Run) -> None:
    """Trains, keeps the best adapter, tests it and reports."""
    console, out = run.console, options.output.out
    seed, method = options.seeds[0], options.methods[0]
    encoder = Encoder.read(options.data.model)
    task = text_task(loaded_texts(options.data, console), encoder, options.data, seed=seed)
    describe(task, console)
    params = task.initial_params(seed)
    training = Training(task, method, options.training, seed=seed)
    run.phase_ended("data")

    folder = AdapterFolder(out / _ADAPTER)
    _train(training, task, folder, options, run)
    best = folder.restore(params)
    jax.block_until_ready(lora_jax.merge(best))  # compiled now, so that the time is the merge's
    merge_seconds, merged = timed(lambda: lora_jax.merge(best))
    test = Examination(task.test, max_length=task.max_length)
    evaluations = {
        "on": test(adapted_apply(task.apply), best),
        "off": test(task.apply, without_adapters(best)),
        "merged": test(task.apply, merged),
    }
    run.phase_ended("testing")
    sizes = {"adapter": bytes_in(folder.weights), "model": encoder.weights_file.stat().st_size}
    findings = Findings(
        task=task,
        method=method,
        wrapped=best,
        evaluations=evaluations,
        history=training.history,
        best=training.best,
        bytes=sizes,
        peak_bytes=peak_bytes(),
        step_bytes=training.steps.bytes,
        merge_seconds=merge_seconds,
        frozen_unchanged=frozen_unchanged(params, training.wrapped),
    )
    present(findings, options, run)


def _train(
    training: Training, task: TextTask, folder: AdapterFolder, options: Options, run: Run
) -> None:
    """Takes the steps that are left, and puts the best adapter into the folder."""
    console = run.console
    with TrainingCheckpoints(options.output.out / _CHECKPOINTS, keep=1) as checkpoints:
        training.begin(checkpoints, resume=options.resume, console=console)
        console.note(lora_jax.summary(training.wrapped))
        console.note(shapes_line(training.shapes(), options.training.batch_size))
        training.compile(console)
        run.phase_ended("compiling")
        card = Card(
            classes=task.classes,
            max_length=task.max_length,
            model=str(options.data.model.resolve()) if options.data.model else None,
            model_sha256=file_hash(task.encoder.weights_file),
            method=str(options.methods[0]),
        )
        examine = Examination(task.validation, max_length=task.max_length)
        adapted = adapted_apply(task.apply)
        training.run(
            lambda wrapped: examine(adapted, wrapped).measured,
            lambda wrapped: folder.save(wrapped, card),
            console=console,
            checkpoints=checkpoints,
        )
    run.phase_ended("training")
