"""One training of a language model, and the tests of what it gives."""

import lora_jax
from experiments.common.claims import frozen_unchanged
from experiments.common.errors import InputError, as_input_error
from experiments.common.files import bytes_in, used_alone
from experiments.common.memory import peak_bytes
from experiments.common.resumable import Keep
from experiments.common.run import Run
from experiments.llm.adapter_folder import AdapterFolder, Card
from experiments.llm.exporting import write_peft
from experiments.llm.mesh import Devices
from experiments.llm.options import Options
from experiments.llm.report import Findings, present
from experiments.llm.soft_prompt import with_prompt
from experiments.llm.task import describe, language_task, loaded_params
from experiments.llm.training import Examination, Training
from experiments.models.added_tokens import read_added_tokens
from experiments.models.pretrained import LanguageModel
from lora_jax.checkpoint import TrainingCheckpoints

_CHECKPOINTS = "checkpoints"
_ADAPTER = "adapter"
_PEFT = "peft"


def train_once(options: Options, run: Run) -> None:
    """Trains, keeps the best adapter, tests it and reports."""
    _check(options)
    devices = Devices.of(options.what_learns.mesh)
    with used_alone(options.output.out, "--out"), devices.in_use():
        _train_and_test(options, run, devices)


def _train_and_test(options: Options, run: Run, devices: Devices) -> None:
    chosen, out = options.what_learns, options.output.out
    added = options.data.add_tokens
    model = LanguageModel.read(chosen.model)
    model = model.with_tokens(() if added is None else read_added_tokens(added))
    task = language_task(model, options.data, options.training, dtype=chosen.dtype, devices=devices)
    describe(task, run.console)
    params = loaded_params(model, chosen, devices, run.console)
    packed = not options.data.no_packing
    training = Training(task, params, options.training, packed=packed, devices=devices)
    run.phase_ended("data")

    base = with_prompt(params, options.training.soft_prompt or 0)
    examine = Examination(task, base, options.training, packed=packed, devices=devices)
    folder = AdapterFolder(out / _ADAPTER)
    card = Card(
        model=str(chosen.model.resolve()) if chosen.model else None,
        quantize=chosen.quantize,
        dtype=chosen.dtype,
        method=options.training.description,
        soft_prompt=options.training.soft_prompt or 0,
        added_tokens=[(each.text, each.start) for each in model.added],
    )
    _train(training, examine, lambda wrapped: folder.save(wrapped, card), options, run)
    best = folder.restore(base)
    ways = {
        "off": examine.of_base,
        "on": lambda: examine(best),
        "merged": lambda: examine(lora_jax.merge(best)),
    }
    evaluations = {}
    with run.console.progress("Testing", len(ways)) as progress:
        for name, found in ways.items():
            evaluations[name] = found()
            progress.advance()
    if _is_for_peft(options):
        with as_input_error():
            write_peft(out / _PEFT, best, model, overwrite=True)
    run.phase_ended("testing")
    findings = Findings(
        task=task,
        wrapped=best,
        evaluations=evaluations,
        history=training.history,
        best=training.best,
        fullness=training.steps.fullness,
        adapter_bytes=bytes_in(folder.weights),
        peak_bytes=peak_bytes(),
        step_bytes=training.compiled.bytes,
        frozen_unchanged=frozen_unchanged(base, training.wrapped),
    )
    present(findings, options, run)


def _is_for_peft(options: Options) -> bool:
    """Says whether PEFT has a kind of folder for what trains: none for single rows alone."""
    method = options.training.method
    return method in ("lora", "dora") or (method == "none" and options.data.add_tokens is None)


def _check(options: Options) -> None:
    training = options.training
    if training.method == "none" and training.soft_prompt is None and not options.data.add_tokens:
        raise InputError(
            "--method none trains nothing; pass --soft-prompt N or --add-tokens FILE with it"
        )
    if training.soft_prompt_from is not None and training.soft_prompt is None:
        raise InputError("--soft-prompt-from is what a soft prompt starts from; pass --soft-prompt")
    if options.training.method == "full" and options.what_learns.quantize != "none":
        raise InputError(
            f"--method full trains every weight, and --quantize is "
            f"{options.what_learns.quantize}, which no optimiser updates; pass none, or lora"
        )


def _train(
    training: Training,
    examine: Examination,
    keep: Keep,
    options: Options,
    run: Run,
) -> None:
    """Takes the steps that are left, and keeps what is the best so far."""
    console = run.console
    with TrainingCheckpoints(options.output.out / _CHECKPOINTS, keep=1) as checkpoints:
        training.begin(checkpoints, resume=options.resume, console=console)
        console.note(lora_jax.summary(training.wrapped))
        console.note(
            f"{training.total:,} steps of {options.training.accumulate} × "
            f"{options.training.batch_size} rows, {100 * training.steps.fullness:.0f} % full"
        )
        training.compile(console)
        run.phase_ended("compiling")
        training.run(examine, keep, console=console, checkpoints=checkpoints)
    run.phase_ended("training")
