"""The training step of the MNIST study beside PyTorch's: PEFT, and LoRA as a parametrised weight.

Every contender has a process of its own, with the same number of threads, and starts from the same
files: the network's weights, the adapters, in PEFT's format, and the batches, in one order. They
take turns, a block of steps each; nothing else should run on the machine meanwhile. That all of
them compute the same is seen in the losses of the first steps.
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.measuring import write_found
from benchmarks.peers.options import comparison_parser
from benchmarks.peers.processes import Remote
from experiments.common.console import Console
from experiments.common.errors import check_installed, exit_code
from experiments.common.options import Parser, positive_int
from experiments.common.tables import Table
from experiments.common.timing import in_turns

OURS = "lora_jax"
_TORCH = "benchmarks.peers.mnist_torch"
_CONTENDERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    OURS: ("benchmarks.peers.mnist_jax:LoraJax", {}),
    "PEFT": (f"{_TORCH}:Peft", {}),
    "PEFT, torch.compile": (f"{_TORCH}:Peft", {"compiled": True}),
    "parametrize": (f"{_TORCH}:Parametrized", {}),
}
_HEADER = (
    "",
    "ms a step",
    "steps/s",
    "ours is faster",
    "to the first step",
    "peak memory",
    "losses",
)
_COMPARED_LOSSES = 50
_LEARNING_RATE = 1e-3


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the table, and returns the exit code."""
    return exit_code(lambda: compare(_parser().parse_args(argv)))


def compare(options: argparse.Namespace) -> None:
    """Lets the contenders take turns, and reports on them."""
    check_installed("peft", "--group peers")
    console = Console()
    names = [name for name in _CONTENDERS if name != "PEFT, torch.compile" or options.compile]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        _write_start(folder, options)
        contenders = {
            name: Measured(stack.enter_context(contextlib.closing(_started(name, folder, options))))
            for name in names
        }
        for contender in contenders.values():
            contender.begin(options.steps)
        with console.progress("Taking turns", options.rounds) as progress:
            for number, order in enumerate(in_turns(names, options.rounds), start=1):
                for name in order:
                    contenders[name].take(number * options.steps, options.steps)
                progress.advance()
        results = {name: found.results() for name, found in contenders.items()}
    differences = _loss_differences(contenders)
    metrics = _metrics(results, differences, options)
    for table in tables(metrics):
        table.show(console)
    console.note(
        f"losses: the greatest relative difference of the first {_COMPARED_LOSSES} from ours\n"
        + ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    )
    write_found(options, metrics)


def _write_start(folder: str, options: argparse.Namespace) -> None:
    arguments = {
        "folder": folder,
        "rank": options.rank,
        "batch_size": options.batch_size,
        "batches": options.steps * (options.rounds + 1),
    }
    target = "benchmarks.peers.mnist_jax:write_start"
    Remote(target, threads=options.threads, arguments=arguments).close()


def _started(name: str, folder: str, options: argparse.Namespace) -> Remote:
    target, arguments = _CONTENDERS[name]
    given = {"folder": folder, "learning_rate": _LEARNING_RATE, **arguments}
    return Remote(target, threads=options.threads, arguments=given)


@dataclass
class Measured:
    """A contender and what was seen of it.

    Attributes:
      remote: the contender.
      losses: of every step.
      rates: the steps per second of each block but the first.
      first_seconds: the first step, for which all is compiled.
    """

    remote: Remote
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    first_seconds: float = 0.0

    def begin(self, steps: int) -> None:
        """Takes the first block, which is not timed but for its first step."""
        self.first_seconds = self._take(0, 1)
        self._take(1, steps - 1)

    def take(self, first: int, count: int) -> None:
        """Takes a block of steps and notes how fast they were."""
        self.rates.append(count / self._take(first, count))

    def results(self) -> dict[str, Any]:
        """Returns the numbers of the table."""
        rate = float(np.median(self.rates))
        return {
            "steps_per_second": rate,
            "milliseconds": 1e3 / rate,
            "seconds_to_first_step": self.remote.seconds_to_start + self.first_seconds,
            "peak_bytes": self.remote.peak_bytes,
            "rates": self.rates,
            "versions": self.remote.call("versions"),
        }

    def _take(self, first: int, count: int) -> float:
        found = self.remote.call("steps", first=first, count=count)
        self.losses += found["losses"]
        return found["seconds"]


def _loss_differences(contenders: Mapping[str, Measured]) -> dict[str, float]:
    """Returns the greatest relative difference of the first losses from ours."""
    ours, *_ = losses = [np.array(each.losses[:_COMPARED_LOSSES]) for each in contenders.values()]
    return {
        name: float(np.max(np.abs(found / ours - 1)))
        for name, found in zip(contenders, losses, strict=True)
    }


def _metrics(
    results: Mapping[str, Mapping[str, Any]],
    differences: Mapping[str, float],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Returns all numbers, fit for JSON."""
    rates = {name: np.array(found["rates"]) for name, found in results.items()}
    versions: dict[str, str] = {}
    for found in results.values():
        versions |= found["versions"]
    return {
        "threads": options.threads,
        "batch_size": options.batch_size,
        "rank": options.rank,
        "faster": {name: float(np.median(rates[OURS] / found)) for name, found in rates.items()},
        "loss_differences": differences,
        "contenders": results,
        "versions": versions,
    }


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Returns what `--json` writes, as a table."""
    rows = [
        [
            name,
            f"{each['milliseconds']:.2f}",
            f"{each['steps_per_second']:.0f}",
            f"{found['faster'][name]:.2f}×",
            f"{each['seconds_to_first_step']:.1f} s",
            f"{each['peak_bytes'] / 1e6:.0f} MB",
            f"{found['loss_differences'][name]:.0e}" if name != OURS else "",
        ]
        for name, each in found["contenders"].items()
    ]
    title = (
        f"MNIST step, 784-1000-2000-10, batch {found['batch_size']}, rank {found['rank']}, "
        f"threads: {found['threads']}"
    )
    return [Table(title, _HEADER, rows)]


def _parser() -> Parser:
    parser = comparison_parser("peft_mnist", __doc__)
    parser.add_argument("--rank", type=positive_int, default=1, help="that of every adapter")
    parser.add_argument("--batch-size", type=positive_int, default=10, help="images in a step")
    parser.add_argument("--steps", type=positive_int, default=50, help="steps in a block")
    parser.add_argument("--rounds", type=positive_int, default=20, help="blocks of each contender")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="PEFT through torch.compile too, which needs a C++ compiler",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
