"""The study on language models beside PEFT: the same model, packed rows, adapters and optimiser.

Each contender has a process of its own, with the same number of threads, and starts from the same
files; they take turns, a block of steps each, and nothing else should run on the machine meanwhile.
Each side has a contender that keeps what the backward pass needs, and one that computes the inside
of each layer again. Then both sides write with the adapter that was trained, merged into the
weights, unless these are quantised. Only losses that differ make the exit code 1: times and memory
depend on the machine. On a machine with a GPU both sides compute there, and memory is the GPU's;
XLA_PYTHON_CLIENT_PREALLOCATE=false leaves some to the other processes.
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Sequence

from benchmarks.peers.contender import OURS, PEFT, Contender, take_turns
from benchmarks.peers.llm_comparison import (
    TRAINING,
    check_compared,
    llm_parser,
    remote,
    write_start,
)
from benchmarks.peers.llm_contender import Writing
from benchmarks.peers.llm_report import Findings, present
from experiments.common.console import Console
from experiments.common.errors import exit_code
from experiments.common.options import Parser, positive_int
from experiments.common.timing import in_turns
from experiments.llm.options import parsed

_WRITING = {
    OURS: "benchmarks.peers.llm_jax:LoraJaxWriter",
    PEFT: "benchmarks.peers.llm_torch:PeftWriter",
}
_BLOCK = 5
_ROUNDS = 5
_EPILOG = """\
examples:
  python -m benchmarks.peft_llm
  python -m benchmarks.peft_llm --first-steps 20 -- --data my.jsonl --max-length 256 --rank 16
  python -m benchmarks.peft_llm --sizes llama-3.2-1b -- --data dialogsum --train-examples 250 \\
    --batch-size 8 --dtype bfloat16 --quantize nf4
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the tables, and returns the exit code: 1 if the losses differ."""
    return exit_code(lambda: compare(_parser().parse_args(argv)))


def compare(options: argparse.Namespace) -> None:
    """Lets all train and both write, and reports on them."""
    check_compared(options)
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        console.note("Preparing the model, the examples and the adapter")
        sizes = write_start(folder, options, steps=options.first_steps, prompts=options.prompts)
        training = _trained(folder, sizes, options, console)
        is_quantized = parsed(options.study).what_learns.quantize != "none"
        writing = {} if is_quantized else _written(folder, options, console)
    present(Findings(training, writing, options.threads, options.study), options, console)


def _trained(
    folder: str, sizes: Sequence[int], options: argparse.Namespace, console: Console
) -> dict[str, Contender]:
    """Returns all contenders after the same steps; ours leaves its adapter in the folder."""
    with contextlib.ExitStack() as stack:
        contenders = {}
        with console.progress("Getting ready to train", len(TRAINING)) as progress:
            for name, (target, arguments) in TRAINING.items():
                own = remote(target, options, folder=folder, **arguments)
                contenders[name] = Contender(stack.enter_context(contextlib.closing(own)))
                contenders[name].begin()
                progress.advance()
        take_turns(contenders, sizes, block=_BLOCK, description="Training", console=console)
        contenders[OURS].remote.call("save")
    return contenders


def _written(folder: str, options: argparse.Namespace, console: Console) -> dict[str, Writing]:
    """Returns both sides after they have written with the same adapter."""
    with contextlib.ExitStack() as stack:
        writers = {}
        with console.progress("Getting ready to write", len(_WRITING)) as progress:
            for name, target in _WRITING.items():
                own = remote(target, options, folder=folder, new_tokens=options.new_tokens)
                writers[name] = Writing(stack.enter_context(contextlib.closing(own)))
                writers[name].begin()
                progress.advance()
        with console.progress("Writing", _ROUNDS) as progress:
            for order in in_turns(list(writers), _ROUNDS):
                for name in order:
                    writers[name].take()
                progress.advance()
    return writers


def _parser() -> Parser:
    parser = llm_parser("peft_llm", __doc__, _EPILOG)
    parser.add_argument(
        "--first-steps",
        type=positive_int,
        default=50,
        metavar="N",
        help="steps of the training to take, whose losses are compared",
    )
    parser.add_argument(
        "--prompts", type=positive_int, default=8, metavar="N", help="prompts to answer at once"
    )
    parser.add_argument(
        "--new-tokens",
        type=positive_int,
        default=64,
        metavar="N",
        help="tokens to write after each prompt",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
