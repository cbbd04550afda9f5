"""What a training step of a large language model needs on each device, without a device.

The step of the study on language models is compiled for accelerators that need not be there, with
the settings of Llama 3.1 and Qwen 3 and from shapes alone: no weight is made. For each model and
machine the tables show the smallest slice that the step fits, or what it needs on --devices:
the memory of one device by kind, the operations for each token, and what the devices send each
other, with LoRA on a bfloat16 base, with LoRA on an nf4 base, and for full fine-tuning. TPUs need
libtpu, H100s JAX's CUDA plugin; a message says how to install it where it is missing. CPU devices,
the fallback, hold bfloat16 in float32 too: read their numbers as an upper bound.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.machines import CPU, MACHINES
from benchmarks.measuring import MeasuringParser, write_found
from benchmarks.scale.models import MODELS, TENSOR
from benchmarks.scale.picture import save_picture
from benchmarks.scale.plans import KINDS, Task, plan_of, smallest_plan
from benchmarks.scale.report import Row, all_numbers, show
from experiments.common.console import Console
from experiments.common.errors import InputError, exit_code
from experiments.common.options import positive_int

# Virtual devices have no memory of their own, of which to ask for the fewest that suffice.
_CPU_DEVICES = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles, prints the tables, and returns the exit code."""
    return exit_code(lambda: _run(_parser().parse_args(argv)))


def _run(options: argparse.Namespace) -> None:
    console = Console()
    tasks = _tasks(options)
    # Compilers of accelerators do not need one, and JAX must not look for it.
    jax.config.update("jax_platforms", "cpu")
    if any(task.machine == CPU for task in tasks):
        jax.config.update("jax_num_cpu_devices", max(task.devices for task in tasks))
    rows: list[Row] = []
    try:
        with console.progress("Compiling", len(tasks)) as progress:
            for task in tasks:
                progress.show(f"{task.model} {task.kind} for {task.machine}")
                row = _row(task, options)
                if row is None:
                    console.note(f"{task.model} {task.kind} fits no slice of {task.machine} here")
                else:
                    rows.append(row)
                    _write(rows, options)
                progress.advance()
    finally:
        # What was compiled before an interruption or an error is not lost.
        if rows:
            show(rows, console)


def _row(task: Task, options: argparse.Namespace) -> Row | None:
    if options.devices or task.machine == CPU:
        return task, plan_of(task)
    return smallest_plan(task)


def _write(rows: Sequence[Row], options: argparse.Namespace) -> None:
    write_found(options, all_numbers(rows))
    if options.picture:
        save_picture(options.picture, rows)


def _tasks(options: argparse.Namespace) -> list[Task]:
    tasks = []
    for model in options.model or ["llama-3.1-8b"]:
        tensor = options.tensor or TENSOR[model]
        if options.devices and options.devices % tensor:
            raise InputError(f"--tensor {tensor} does not divide {options.devices} devices")
        shared = MODELS[model].num_key_value_heads
        if shared % tensor:
            raise InputError(
                f"--tensor {tensor} does not divide the {shared} heads of keys of {model}"
            )
        tasks += [
            Task(
                model=model,
                kind=kind,
                machine=machine,
                devices=options.devices or (_CPU_DEVICES if machine == CPU else 0),
                tensor=tensor,
                length=options.length,
                examples=options.examples,
                rank=options.rank,
            )
            for machine in options.machine or [CPU]
            for kind in options.kind or KINDS
        ]
    return tasks


def _parser() -> Any:
    parser = MeasuringParser("scale", __doc__)
    parser.add_argument(
        "--model",
        action="append",
        choices=list(MODELS),
        help="a model (repeatable; default: llama-3.1-8b)",
    )
    parser.add_argument(
        "--machine",
        action="append",
        choices=[*MACHINES, CPU],
        help="a machine (repeatable; default: virtual devices of this CPU)",
    )
    parser.add_argument(
        "--kind", action="append", choices=KINDS, help="a kind of step (repeatable; default: all)"
    )
    parser.add_argument(
        "--devices",
        type=positive_int,
        metavar="N",
        help="default: the smallest slice of the machine that the step fits; 8 of a CPU",
    )
    parser.add_argument(
        "--tensor",
        type=positive_int,
        metavar="N",
        help="how many devices share an example; default: 1, 4 and 8 by the size of the model",
    )
    parser.add_argument("--length", type=positive_int, default=4_096, help="tokens of an example")
    parser.add_argument(
        "--examples", type=positive_int, default=1, help="examples of each group of devices"
    )
    parser.add_argument("--rank", type=positive_int, default=16, help="of the adapters")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the memory as a PNG")
    return parser


if __name__ == "__main__":
    sys.exit(main())
