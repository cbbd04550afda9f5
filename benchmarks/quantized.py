"""Training steps on quantised weights: memory and time, beside a dense base and beside Qwix.

For the network of the MNIST study, every contender has a process of its own and starts from the
same files; they take turns, a block of steps each. Qwix's QLoRA is among them if it is installed.
Its tiles must divide a layer's inputs: 56 for 784 and 50 for 1000 and 2000, where 64 weights share
a scale here. It does not quantise scales. The steps of the scanned transformer take turns in one
process. With --target, programs are compiled for an accelerator that need not be there, and
nothing is run.
"""

import argparse
import contextlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from benchmarks.machines import MACHINES, compiler_versions, devices_of
from benchmarks.measuring import write_found
from benchmarks.models import SCANNED_TRANSFORMER, Model
from benchmarks.peers.options import comparison_parser
from benchmarks.peers.processes import Remote
from benchmarks.programs import OPTIMIZER
from benchmarks.quantized_programs import (
    DENSE,
    FORMATS,
    Memory,
    in_dtype,
    largest_matrix_bytes,
    on_device,
    step_program,
    transformer,
    wrapped_params,
)
from experiments.common.console import Console
from experiments.common.errors import exit_code
from experiments.common.memory import keep_freed_memory
from experiments.common.options import positive_int
from experiments.common.tables import Table
from experiments.common.timing import in_turns, rounds_of_milliseconds

MODELS = ("mnist", "scanned-transformer")
_DEFAULT_FORMATS = (DENSE, "nf4", "int8")
_OF_QWIX = ("nf4", "int8")
_BATCH, _RANK, _LEARNING_RATE = 10, 1, 1e-3

Row = dict[str, Any]
Found = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the tables, and returns the exit code."""
    return exit_code(lambda: _measure(_parser().parse_args(argv)))


def _measure(options: argparse.Namespace) -> None:
    console = Console()
    formats = [DENSE, *(name for name in options.format or _DEFAULT_FORMATS if name != DENSE)]
    measured: dict[str, Callable[..., Found]] = {}
    if options.target:
        measured[options.target] = _compiled_for
    for name in options.model or ([] if options.target else MODELS):
        measured[name] = _mnist if name == "mnist" else _scanned_transformer
    found = {}
    for name, measure in measured.items():
        found[name] = measure(options, formats, console)
        _table(found[name]).show(console)
    write_found(options, found)


# --- the MNIST study's step --------------------------------------------------------------------


def _mnist(options: argparse.Namespace, formats: Sequence[str], console: Console) -> Found:
    contenders = _contenders(formats, console)
    steps, rounds = options.steps, options.rounds
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        start = {"folder": folder, "rank": _RANK, "batch_size": _BATCH}
        start["batches"] = steps * (rounds + 1)
        written = Remote(
            "benchmarks.peers.mnist_jax:write_start", threads=options.threads, arguments=start
        )
        written.close()
        remotes = {
            name: stack.enter_context(
                contextlib.closing(
                    Remote(
                        target,
                        threads=options.threads,
                        arguments={
                            "folder": folder,
                            "learning_rate": _LEARNING_RATE,
                            **arguments,
                        },
                    )
                )
            )
            for name, (target, arguments) in contenders.items()
        }
        for remote in remotes.values():
            remote.call("steps", first=0, count=steps)
        seconds: dict[str, list[float]] = {name: [] for name in remotes}
        losses: dict[str, list[float]] = {name: [] for name in remotes}
        with console.progress("MNIST, taking turns", rounds) as progress:
            for number, order in enumerate(in_turns(list(remotes), rounds), start=1):
                for name in order:
                    taken = remotes[name].call("steps", first=number * steps, count=steps)
                    seconds[name].append(taken["seconds"] / steps)
                    losses[name] += taken["losses"]
                progress.advance()
        memory = {name: remote.call("memory") for name, remote in remotes.items()}
        versions = {}
        for remote in remotes.values():
            versions |= remote.call("versions")
    rows = [
        {
            "name": name,
            "milliseconds": 1e3 * float(np.median(seconds[name])),
            "dense_is_faster": _ratio(seconds[name], seconds[DENSE]),
            "ours_is_faster": _over_ours(name, seconds),
            **memory[name],
            "last_losses": float(np.mean(losses[name][-steps:])),
        }
        for name in remotes
    ]
    console.note(", ".join(f"{name} {version}" for name, version in versions.items()))
    title = (
        f"MNIST step, 784-1000-2000-10, batch {_BATCH}, rank {_RANK}, threads: {options.threads}"
    )
    return {"title": title, "versions": versions, "rows": rows}


def _contenders(
    formats: Sequence[str], console: Console
) -> Mapping[str, tuple[str, Mapping[str, Any]]]:
    ours = "benchmarks.peers.mnist_quantized:LoraJax"
    found = {name: (ours, {} if name == DENSE else {"quantize": name}) for name in formats}
    if importlib.util.find_spec("qwix") is None:
        console.note("Qwix is not installed, and is left out: make peers, or pip install qwix")
        return found
    theirs = "benchmarks.peers.mnist_qwix:Qwix"
    return found | {
        f"Qwix {name}": (theirs, {"qtype": name}) for name in formats if name in _OF_QWIX
    }


def _over_ours(name: str, seconds: Mapping[str, Sequence[float]]) -> float | None:
    """Returns how many steps we take while Qwix takes one with the same format."""
    _, is_qwix, format_name = name.partition("Qwix ")
    return _ratio(seconds[name], seconds[format_name]) if is_qwix else None


# --- the scanned transformer -------------------------------------------------------------------


def _scanned_transformer(
    options: argparse.Namespace, formats: Sequence[str], console: Console
) -> Found:
    model = SCANNED_TRANSFORMER
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(size=leaf.shape) / 30, leaf.dtype), model.params
    )
    inputs = jnp.asarray(random.normal(size=model.inputs.shape), jnp.float32)
    runs = {name: _Steps(model, wrapped_params(model, name, params), inputs) for name in formats}
    found = rounds_of_milliseconds(
        runs, options.rounds, console=console, description="Scanned transformer, taking turns"
    )
    rows = [
        {
            "name": name,
            "milliseconds": float(np.median(found[name])),
            "dense_is_faster": _ratio(found[name], found[DENSE]),
            **runs[name].memory,
        }
        for name in formats
    ]
    return {"title": model.description, "rows": rows}


class _Steps:
    """A training whose steps are taken one by one, all on the same batch."""

    def __init__(self, model: Model, wrapped: Any, inputs: jax.Array) -> None:
        program = step_program(model, wrapped)
        labels = program.arguments[-1]
        self._batch = (inputs, jnp.zeros(labels.shape, labels.dtype))
        self._adapters, self._frozen = lora_jax.split(wrapped)
        # The base is shared by all trainings; what a step overwrites is not.
        self._adapters = jax.tree.map(jnp.copy, self._adapters)
        self._state = OPTIMIZER.init(self._adapters)
        self._compiled = program.lowered().compile()
        self.memory = _memory_row(Memory.of(self._compiled))

    def __call__(self) -> Any:
        self._adapters, self._state, loss = self._compiled(
            self._adapters, self._state, self._frozen, *self._batch
        )
        return loss


# --- accelerators that are not there -----------------------------------------------------------


def _compiled_for(options: argparse.Namespace, formats: Sequence[str], console: Console) -> Found:
    device = devices_of(options.target, 4)[0]
    model = in_dtype(
        transformer(
            layers=options.layers,
            embed=options.embed,
            heads=options.embed // 128,
            batch=options.batch,
            tokens=options.tokens,
        ),
        jnp.bfloat16,
    )
    rows = []
    with console.progress(f"Compiling for {options.target}", len(formats)) as progress:
        for name in formats:
            wrapped = wrapped_params(model, name)
            compiled = on_device(step_program(model, wrapped), device).lowered().compile()
            cost: Any = compiled.cost_analysis()
            rows.append(
                {
                    "name": name,
                    **_memory_row(Memory.of(compiled)),
                    "layer_bytes": None if name == DENSE else largest_matrix_bytes(wrapped),
                    "flops": cost["flops"],
                    "bytes": cost["bytes accessed"],
                    "optimal_seconds": cost.get("optimal_seconds"),
                }
            )
            progress.advance()
    console.note(
        "TFLOP, GB and time: XLA counts the body of a loop once, whatever the number of layers"
    )
    title = f"{model.description}, bfloat16, for {options.target}"
    return {"title": title, "versions": compiler_versions(), "rows": rows}


# --- report ------------------------------------------------------------------------------------


def _memory_row(memory: Memory) -> Row:
    return {"argument_bytes": memory.arguments, "temporary_bytes": memory.temporary}


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Returns what `--json` writes, as a table for each model."""
    return [_table(each) for each in found.values() if "rows" in each]


def _table(found: Found) -> Table:
    rows = found["rows"]
    columns = {name: cell for name, cell in _COLUMNS.items() if any(map(cell, rows))}
    return Table(
        found["title"],
        ["", *columns],
        [[row["name"], *(cell(row) for cell in columns.values())] for row in rows],
    )


def _ratio(times: Any, others: Any) -> float:
    """Returns the median over rounds of one contender's time over another's."""
    return float(np.median(np.divide(times, others)))


def _column(name: str, style: str, of: Callable[[float], float] = float) -> Callable[[Row], str]:
    """Returns what writes one number of a row; nothing for a row that lacks it."""
    return lambda row: "" if row.get(name) is None else style.format(of(row[name]))


def _megabytes(name: str) -> Callable[[Row], str]:
    return _column(name, "{:,.2f} MB", lambda count: count / 1e6)


_COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "ms a step": _column("milliseconds", "{:.2f}"),
    "steps/s": _column("milliseconds", "{:.1f}", lambda milliseconds: 1e3 / milliseconds),
    "of dense's time": _column("dense_is_faster", "{:.2f}×"),
    "arguments": _megabytes("argument_bytes"),
    "temporary": _megabytes("temporary_bytes"),
    "ours is faster": _column("ours_is_faster", "{:.2f}×"),
    "largest layer": _megabytes("layer_bytes"),
    "TFLOP": _column("flops", "{:.3f}", lambda count: count / 1e12),
    "GB accessed": _column("bytes", "{:.2f}", lambda count: count / 1e9),
    "XLA expects": _column("optimal_seconds", "{:.2f} ms", lambda seconds: 1e3 * seconds),
}


def _parser() -> Any:
    parser = comparison_parser("quantized", __doc__)
    parser.add_argument(
        "--model", action="append", choices=MODELS, help="one model only (default: both)"
    )
    parser.add_argument(
        "--format",
        action="append",
        choices=FORMATS[1:],
        help="a format beside dense (may be repeated; default: nf4 and int8)",
    )
    parser.add_argument("--steps", type=positive_int, default=50, help="MNIST: steps in a block")
    parser.add_argument("--rounds", type=positive_int, default=20, help="turns of each contender")
    parser.add_argument(
        "--target",
        choices=[name for name in MACHINES if name != "h100"],
        help="compile the scanned transformer for this accelerator, in bfloat16, and print memory "
        "and cost; it needs libtpu and no accelerator",
    )
    sizes = {"layers": 16, "embed": 2048, "batch": 8, "tokens": 1024}
    for name, size in sizes.items():
        parser.add_argument(
            f"--{name}", type=positive_int, default=size, help=f"of that transformer, {size}"
        )
    return parser


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
