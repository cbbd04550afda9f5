"""The study on text beside PEFT: the same encoder, sentences, batches, adapters and optimiser.

Each contender has a process of its own, with the same number of threads, and starts from the same
files; they take turns, a block of steps each, and nothing else should run on the machine meanwhile.
First without dropout, where the losses of both must be the same; then as the study trains, with
every seed to the end, where the accuracies must be alike. At last each predicts with the adapter
that the other has trained.
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.peers.contender import OURS, PEFT, take_turns
from benchmarks.peers.options import comparison_parser
from benchmarks.peers.processes import Remote
from benchmarks.peers.text_contender import Exchange, TextContender
from benchmarks.peers.text_report import Findings, present
from experiments.common.console import Console
from experiments.common.errors import InputError, check_installed, exit_code
from experiments.common.options import Parser, positive_int
from experiments.text.options import parsed

_CLASSES = {
    OURS: "benchmarks.peers.text_jax:LoraJax",
    PEFT: "benchmarks.peers.text_torch:Peft",
}
_BLOCK = 10
_EPILOG = """\
examples:
  python -m benchmarks.peft_text
  python -m benchmarks.peft_text --seeds 1 -- --rank 16 --targets all-linear --epochs 1
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the tables, and returns the exit code."""
    return exit_code(lambda: compare(_parser().parse_args(argv)))


def compare(options: argparse.Namespace) -> None:
    """Lets both train, and reports on them."""
    for package in ("peft", "transformers"):
        check_installed(package, "--group peers")
    study_arguments = _study_arguments(options)
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        console.note("Preparing the sentences and the adapters")
        steps = _write_start(name, study_arguments, options)
        fixed = _without_dropout(folder, min(options.first_steps, steps), options, console)
        trained, exchanges = _with_dropout(folder, steps, options, console)
    present(Findings(fixed, trained, exchanges, options.threads, study_arguments), options, console)


def _study_arguments(options: argparse.Namespace) -> list[str]:
    """Returns what the study would be called with; raises unless it is LoRA alone."""
    chosen = ["--train-examples", "2000", *options.study, "--seeds", str(options.seeds)]
    arguments = ["--method", "lora", "--rank", "8", *chosen]
    study = parsed(arguments)
    if [method.name for method in study.methods] != ["lora"]:
        raise InputError("the study's --method and --rank ask for more than one training of LoRA")
    if study.training.adapter_dropout:
        raise InputError("--adapter-dropout is not compared; leave it out")
    return arguments


def _write_start(folder: str, study_arguments: list[str], options: argparse.Namespace) -> int:
    """Has the files written that both start from, and returns how many steps a training has."""
    start = _remote("benchmarks.peers.text_start:Start", options, folder=folder)
    with contextlib.closing(start):
        return start.call("write", study_arguments=study_arguments)


def _remote(target: str, options: argparse.Namespace, **arguments: object) -> Remote:
    return Remote(target, threads=options.threads, arguments=arguments)


@contextlib.contextmanager
def _contenders(
    folder: Path, options: argparse.Namespace, *, dropout: bool
) -> Iterator[dict[str, TextContender]]:
    with contextlib.ExitStack() as stack:
        contenders = {}
        for name, target in _CLASSES.items():
            remote = _remote(target, options, folder=str(folder), dropout=dropout)
            contenders[name] = TextContender(stack.enter_context(contextlib.closing(remote)))
        yield contenders


def _without_dropout(
    folder: Path, steps: int, options: argparse.Namespace, console: Console
) -> dict[str, TextContender]:
    """Returns both after the same first steps, in which nothing is drawn."""
    with _contenders(folder, options, dropout=False) as contenders:
        for contender in contenders.values():
            contender.begin(seed=0)
        _take_turns(contenders, steps, "Without dropout", console)
    return contenders


def _with_dropout(
    folder: Path, steps: int, options: argparse.Namespace, console: Console
) -> tuple[dict[str, TextContender], dict[str, Exchange]]:
    """Returns both after training with every seed, and how each does with the other's adapter."""
    with _contenders(folder, options, dropout=True) as contenders:
        for seed in range(options.seeds):
            for contender in contenders.values():
                contender.begin(seed=seed)
            _take_turns(contenders, steps, f"Training, seed {seed}", console)
            for name, contender in contenders.items():
                contender.finish(_made(folder / f"{name}_{seed}"))
        exchanges = {
            maker: contenders[user].exchange(folder / f"{maker}_{options.seeds - 1}")
            for maker, user in ((OURS, PEFT), (PEFT, OURS))
        }
    return contenders, exchanges


def _take_turns(
    contenders: Mapping[str, TextContender], steps: int, description: str, console: Console
) -> None:
    take_turns(contenders, [1] * steps, block=_BLOCK, description=description, console=console)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _parser() -> Parser:
    parser = comparison_parser("peft_text", __doc__)
    parser.epilog = _EPILOG
    parser.add_argument("--seeds", type=positive_int, default=3, help="trainings of each")
    parser.add_argument(
        "--first-steps",
        type=positive_int,
        default=50,
        metavar="N",
        help="steps without dropout, whose losses are compared",
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the losses of those steps")
    parser.add_argument(
        "study",
        nargs="*",
        metavar="OPTION",
        help="after --, options of `python -m experiments.text_lora`, but for --method and --seeds "
        "(default: --rank 8 --train-examples 2000)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
