"""What a LoRA step of a large model needs on each device, without a device.

Llama-3-shaped models of 8, 70 and 405 billion parameters are compiled for accelerators that need
not be there, from shapes alone: no weight is made. For each model, machine and number of devices
the tables show the memory of one device by kind, the operations for each token, what the devices
send each other, and whether it fits: with LoRA on a bfloat16 base, with LoRA on an nf4 base, and
for full fine-tuning. TPUs need libtpu, H100s JAX's CUDA plugin; a message says how to install it
where it is missing. CPU devices, the fallback, hold bfloat16 in float32 too: read their numbers as
an upper bound.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.llama_layers import SIZES
from benchmarks.machines import CPU, GIB, MACHINES
from benchmarks.scale.picture import save_picture
from benchmarks.scale.plans import KINDS, Plan, Task, plan_of
from experiments.common.console import Console
from experiments.common.errors import InputError, exit_code
from experiments.common.files import write_json
from experiments.common.options import Parser, positive_int

# The number of devices, and how many share an example, where the command does not say.
_DEVICES = {"8b": (8, 1), "70b": (64, 4), "405b": (256, 8)}

Row = tuple[Task, Plan]


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles, prints the table, and returns the exit code."""
    return exit_code(lambda: _run(_parser().parse_args(argv)))


def _run(options: argparse.Namespace) -> None:
    tasks = _tasks(options)
    # Compilers of accelerators do not need one, and JAX must not look for it.
    jax.config.update("jax_platforms", "cpu")
    if any(task.machine == CPU for task in tasks):
        jax.config.update("jax_num_cpu_devices", max(task.devices for task in tasks))
    console, rows = Console(), []
    try:
        with console.progress("Compiling", len(tasks)) as progress:
            for task in tasks:
                progress.show(f"{task.model} {task.kind} for {task.devices} {task.machine}")
                rows.append((task, plan_of(task)))
                progress.advance()
    finally:
        # What was compiled before an interruption or an error is not lost.
        if rows:
            _report(rows, options, console)


def _tasks(options: argparse.Namespace) -> list[Task]:
    tasks = []
    for model in options.model or ["8b"]:
        devices, tensor = _DEVICES[model]
        devices = options.devices or devices
        tensor = options.tensor or tensor
        if devices % tensor:
            raise InputError(f"--tensor {tensor} does not divide {devices} devices")
        if SIZES[model].kv_heads % tensor:
            raise InputError(
                f"--tensor {tensor} does not divide the {SIZES[model].kv_heads} heads of keys of "
                f"{model}"
            )
        tasks += [
            Task(
                model=model,
                sizes=SIZES[model],
                kind=kind,
                machine=machine,
                devices=devices,
                tensor=tensor,
                length=options.length,
                examples=options.examples,
                rank=options.rank,
            )
            for machine in options.machine or [CPU]
            for kind in options.kind or KINDS
        ]
    return tasks


# --- report ------------------------------------------------------------------------------------


def _report(rows: Sequence[Row], options: argparse.Namespace, console: Console) -> None:
    task = rows[0][0]
    console.rule(
        f"memory of one device in GiB; rank {task.rank}, examples of {task.length:,} tokens"
    )
    console.table(
        [
            "model",
            "devices",
            "step",
            "base",
            "trained",
            "optimiser",
            "activations",
            "temporaries",
            "total",
            "fits",
        ],
        [_memory_cells(task, plan) for task, plan in rows],
    )
    console.rule("work")
    console.table(
        ["model", "devices", "step", "examples", "TFLOP/token", "moved by a device", "compiled in"],
        [_work_cells(task, plan) for task, plan in rows],
    )
    if options.json:
        write_json(options.json, [_as_json(task, plan) for task, plan in rows])
    if options.picture:
        save_picture(options.picture, rows)


def _memory_cells(task: Task, plan: Plan) -> list[str]:
    kinds = (plan.base, plan.trained, plan.optimizer, plan.activations, plan.temporaries)
    fits = plan.fits(task.machine)
    return [
        *_names(task),
        *(f"{kind / GIB:.2f}" for kind in kinds),
        f"{plan.total / GIB:.1f}",
        "" if fits is None else "yes" if fits else "no",
    ]


def _work_cells(task: Task, plan: Plan) -> list[str]:
    moved = [
        f"{traffic.count:,} {kind} {traffic.bytes / GIB:.1f} GiB"
        for kind, traffic in sorted(plan.traffic.items())
        if traffic.bytes > GIB / 20
    ]
    return [
        *_names(task),
        f"{task.batch}",
        f"{plan.flops_per_token / 1e12:.4f}",
        "\n".join(moved) or "nothing",
        f"{plan.compile_seconds:.0f} s",
    ]


def _names(task: Task) -> list[str]:
    return [task.model, f"{task.devices} {task.machine}", task.kind]


def _as_json(task: Task, plan: Plan) -> dict[str, Any]:
    return {
        **{name: getattr(task, name) for name in ("model", "kind", "machine", "devices", "tensor")},
        **{name: getattr(task, name) for name in ("batch", "length", "rank")},
        **dataclasses.asdict(plan),
        "total": plan.total,
        "fits": plan.fits(task.machine),
    }


def _parser() -> Any:
    parser = Parser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument(
        "--model", action="append", choices=list(SIZES), help="a model (repeatable; default: 8b)"
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
        "--devices", type=positive_int, metavar="N", help="default: 8, 64 and 256 by model"
    )
    parser.add_argument(
        "--tensor",
        type=positive_int,
        metavar="N",
        help="how many devices share an example; default: 1, 4 and 8 by model",
    )
    parser.add_argument("--length", type=positive_int, default=4_096, help="tokens of an example")
    parser.add_argument(
        "--examples", type=positive_int, default=1, help="examples of each group of devices"
    )
    parser.add_argument("--rank", type=positive_int, default=16, help="of the adapters")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to a file")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the memory as a PNG")
    return parser


if __name__ == "__main__":
    sys.exit(main())
