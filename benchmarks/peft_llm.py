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
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.peers.contender import OURS, PEFT, Contender, take_turns
from benchmarks.peers.llm_contender import Writing
from benchmarks.peers.llm_report import Findings, present
from benchmarks.peers.options import comparison_parser
from benchmarks.peers.processes import Remote
from benchmarks.peers.random_model import SIZES
from experiments.common.console import Console
from experiments.common.errors import InputError, check_installed, exit_code
from experiments.common.options import Parser, positive_int
from experiments.common.timing import in_turns
from experiments.llm.options import parsed

_TRAINING: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    OURS: ("benchmarks.peers.llm_jax:LoraJax", {"remat": True}),
    f"{OURS}, no remat": ("benchmarks.peers.llm_jax:LoraJax", {"remat": False}),
    PEFT: ("benchmarks.peers.llm_torch:Peft", {"checkpointing": False}),
    f"{PEFT}, checkpointing": ("benchmarks.peers.llm_torch:Peft", {"checkpointing": True}),
}
_WRITING = {
    OURS: "benchmarks.peers.llm_jax:LoraJaxWriter",
    PEFT: "benchmarks.peers.llm_torch:PeftWriter",
}
_BLOCK = 5
_ROUNDS = 5
_QUANTIZED = ("none", "nf4")
_DEFAULT = ("--data", "dialogsum", "--train-examples", "250")
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
    for package in ("peft", "transformers"):
        check_installed(package, "--group peers")
    study_arguments = _study_arguments(options)
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        console.note("Preparing the model, the examples and the adapter")
        sizes = _write_start(folder, study_arguments, options)
        training = _trained(folder, sizes, options, console)
        is_quantized = parsed(study_arguments).what_learns.quantize != "none"
        writing = {} if is_quantized else _written(folder, options, console)
    present(Findings(training, writing, options.threads, study_arguments), options, console)


def _study_arguments(options: argparse.Namespace) -> list[str]:
    """Returns what the study would be called with; raises unless PEFT's side can do the same."""
    study = parsed(options.study)
    training, model = study.training, study.what_learns
    compared = {
        "--method": (training.method, "lora"),
        "--objective": (training.objective, "sft"),
        "--mesh": (model.mesh, None),
    }
    for option, (chosen, expected) in compared.items():
        if chosen != expected:
            raise InputError(
                f"{option} {chosen} is not compared: both sides train LoRA on answers, on one "
                "device; leave it out"
            )
    if model.quantize not in _QUANTIZED:
        raise InputError(
            f"--quantize {model.quantize} is not compared; expected one of {', '.join(_QUANTIZED)}"
        )
    if model.quantize == "nf4":
        check_installed("bitsandbytes", "--group peers")
    if options.sizes is not None and model.model is not None:
        raise InputError("--sizes is for weights of the packaged model's kind; leave out --model")
    if training.no_remat:
        raise InputError("--no-remat is compared anyway, beside training without it; leave it out")
    return list(options.study)


def _write_start(folder: str, study_arguments: list[str], options: argparse.Namespace) -> list[int]:
    """Has the files written that all start from, and returns the tokens of each step."""
    start = _remote("benchmarks.peers.llm_start:Start", options, folder=folder)
    with contextlib.closing(start):
        return start.call(
            "write",
            study_arguments=study_arguments,
            most_steps=options.first_steps,
            most_prompts=options.prompts,
            sizes=options.sizes,
        )


def _remote(target: str, options: argparse.Namespace, **arguments: object) -> Remote:
    return Remote(target, threads=options.threads, arguments=arguments)


def _trained(
    folder: str, sizes: Sequence[int], options: argparse.Namespace, console: Console
) -> dict[str, Contender]:
    """Returns all contenders after the same steps; ours leaves its adapter in the folder."""
    with contextlib.ExitStack() as stack:
        contenders = {}
        with console.progress("Getting ready to train", len(_TRAINING)) as progress:
            for name, (target, arguments) in _TRAINING.items():
                remote = _remote(target, options, folder=folder, **arguments)
                contenders[name] = Contender(stack.enter_context(contextlib.closing(remote)))
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
                remote = _remote(target, options, folder=folder, new_tokens=options.new_tokens)
                writers[name] = Writing(stack.enter_context(contextlib.closing(remote)))
                writers[name].begin()
                progress.advance()
        with console.progress("Writing", _ROUNDS) as progress:
            for order in in_turns(list(writers), _ROUNDS):
                for name in order:
                    writers[name].take()
                progress.advance()
    return writers


def _parser() -> Parser:
    parser = comparison_parser("peft_llm", __doc__)
    parser.epilog = _EPILOG
    parser.add_argument(
        "--sizes",
        choices=SIZES,
        help="random weights in the sizes of this model, with the tokenizer of the packaged one",
    )
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
    parser.add_argument(
        "study",
        nargs="*",
        default=_DEFAULT,
        metavar="OPTION",
        help="after --, options of `python -m experiments.llm_lora` "
        f"(default: {' '.join(_DEFAULT)})",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
