"""A pretraining from its texts to a folder that other commands fine-tune."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax
from experiments.common.console import Console, device_name
from experiments.common.errors import InputError
from experiments.common.files import used_alone, writable_folder, write_json
from experiments.common.memory import peak_bytes
from experiments.common.run import Run
from experiments.llm.dialogsum import NAME as DIALOGSUM
from experiments.llm.dialogsum import dialogues
from experiments.llm.exporting import write_huggingface
from experiments.llm.mesh import Devices
from experiments.llm.options import TrainingOptions
from experiments.llm.task import LanguageTask
from experiments.llm.texts import TokenizedExample, TokenizedExamples, texts_of
from experiments.llm.training import Examination, Training
from experiments.models.entries import CONFIG, read_entries
from experiments.models.pretrained import LanguageModel
from experiments.pretraining.gaps import with_gaps
from experiments.pretraining.options import Options
from experiments.pretraining.vocabulary import SENTINELS, write_tokenizer
from lora_jax.checkpoint import TrainingCheckpoints

# The tokenizer and the settings, before there are weights.
_BEGUN = "begun"
_MODEL = "model"


def pretrain(options: Options, run: Run) -> None:
    """Trains a vocabulary and a model, keeps the best, and reports.

    Raises:
      InputError: there are fewer dialogues than were asked for.
    """
    if options.size.width % options.size.heads:
        raise InputError(
            f"--width {options.size.width} is not a multiple of --heads {options.size.heads}"
        )
    with used_alone(options.output.out, "--out"):
        _pretrain(options, run)


def _pretrain(options: Options, run: Run) -> None:
    out, learning = options.output.out, options.learning
    texts = [dialogue.text for dialogue in dialogues("train")]
    held_out = [dialogue.text for dialogue in dialogues("dev")]
    for option, count, found in (
        ("--texts", learning.texts, texts),
        ("--held-out", learning.held_out, held_out),
    ):
        if count is not None and count > len(found):
            raise InputError(f"{option} is {count}, and there are {len(found)} dialogues")
    texts, held_out = texts[: learning.texts], held_out[: learning.held_out]
    model = _begun(out / _BEGUN, texts, options)
    task = _task(model, texts, held_out, options)
    run.phase_ended("data")

    params = _random_params(model, seed=learning.seed)
    training_options = TrainingOptions(
        method="full",
        epochs=1,
        batch_size=learning.batch_size,
        learning_rate=learning.learning_rate,
        warmup=learning.warmup,
        evaluate_every=learning.evaluate_every,
        no_remat=True,
        seed=learning.seed,
    )
    training = Training(
        task,
        params,
        training_options,
        packed=True,
        devices=Devices(),
        # T5's own. Its steps are in proportion to each matrix: embeddings begin with a standard
        # deviation of 1, the queries of attention with 1/64, and AdamW's steps are of one size.
        optimizer=optax.adafactor,
    )
    examine = Examination(task, params, training_options, packed=True, devices=Devices())
    before = examine(params)
    console = run.console
    console.note(f"{lora_jax.count_parameters(params).total:,} parameters, all of them train")
    with TrainingCheckpoints(out / "checkpoints", keep=1) as checkpoints:
        training.begin(checkpoints, resume=options.resume, console=console)
        training.compile(console)
        run.phase_ended("compiling")
        training.run(
            examine,
            lambda wrapped: write_huggingface(
                out / _MODEL, lora_jax.merge(wrapped), model, overwrite=True
            ),
            console=console,
            checkpoints=checkpoints,
        )
    run.phase_ended("training")
    _present(training, before, params, options, run)


def _begun(folder: Path, texts: Sequence[str], options: Options) -> LanguageModel:
    """Returns the model before it has weights: its settings, and a tokenizer of these texts."""
    entries = options.size.entries()
    if options.resume and (folder / CONFIG).is_file():
        if read_entries(folder / CONFIG) != entries:
            raise InputError(
                "--resume continues a model of another size; pass that with which it began, or "
                "leave out --resume to train again"
            )
    else:
        writable_folder(folder, "--out")
        write_tokenizer(folder, texts, options.size.vocabulary)
        write_json(folder / CONFIG, entries)
    return LanguageModel.read(folder)


def _task(
    model: LanguageModel, texts: Sequence[str], held_out: Sequence[str], options: Options
) -> LanguageTask:
    """Returns the task: each epoch has other gaps."""
    learning = options.learning
    tokenizer = model.tokenizer()
    encoded, others = (
        [tokenizer.encoded(text)[: learning.max_length - 1] for text in part]
        for part in (texts, held_out)
    )
    sentinels = np.arange(model.config.vocab_size)[: -SENTINELS - 1 : -1]

    def examples(tokens: Sequence[np.ndarray], *seed: int) -> list[TokenizedExample]:
        random = np.random.default_rng((learning.seed, *seed))
        return [
            with_gaps(
                each,
                options.gaps,
                sentinels,
                random,
                start=model.config.decoder_start_token_id,
                end=tokenizer.end_ids[0],
            )
            for each in tokens
        ]

    train = [each for epoch in range(learning.epochs) for each in examples(encoded, 0, epoch)]
    return LanguageTask(
        name=DIALOGSUM,
        model=model,
        network=model.network(),
        texts=texts_of(model),
        max_length=learning.max_length,
        train=TokenizedExamples(tuple(train), 0, 0),
        validation=TokenizedExamples(tuple(examples(others, 1)), 0, 0),
    )


def _random_params(model: LanguageModel, *, seed: int) -> Any:
    token = jnp.zeros((1, 1), jnp.int32)
    return jax.jit(model.network().init)(jax.random.key(seed), token, token)["params"]


def _present(
    training: Training, before: dict[str, float], params: Any, options: Options, run: Run
) -> None:
    history, out = training.history, options.output.out
    assert training.best is not None
    results = {
        "device": device_name(),
        "options": options.as_json(),
        "parameters": lora_jax.count_parameters(params).total,
        "steps": training.step,
        "fullness": training.steps.fullness,
        "held_out": {"before": before, "best": training.best},
        "tokens_per_second": sum(history.of("seen")) / sum(history.of("seconds")),
        "peak_bytes": peak_bytes(),
        "evaluations": history.evaluations,
    }
    _print_table(results, run.console)
    run.console.note(f"The model: {out / _MODEL}")

    def draw(folder: Path) -> None:
        # Matplotlib takes half a second to import, which --no-plots saves.
        from experiments.llm.plots import save_curve

        title = f"T5 of {results['parameters']:,} parameters: filling gaps"
        save_curve(folder / "curve.png", history, before["loss"], title)

    run.finish(results, draw=draw)


def _print_table(results: dict[str, Any], console: Console) -> None:
    console.rule("Gaps of held-out dialogues")
    rows = [
        [name, *(f"{found[key]:.4f}" for key in ("loss", "perplexity"))]
        for name, found in results["held_out"].items()
    ]
    console.table(["", "loss", "perplexity"], rows)
