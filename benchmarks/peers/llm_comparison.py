"""What the commands that compare trainings of a language model share: options, sides and files."""

import argparse
import contextlib
from collections.abc import Mapping
from typing import Any

from benchmarks.measuring import MeasuringParser
from benchmarks.peers.contender import OURS, PEFT
from benchmarks.peers.options import comparison_parser
from benchmarks.peers.processes import Remote
from benchmarks.peers.random_model import SIZES
from experiments.common.errors import InputError, check_installed
from experiments.llm.options import parsed

TRAINING: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    OURS: ("benchmarks.peers.llm_jax:LoraJax", {"remat": True}),
    f"{OURS}, no remat": ("benchmarks.peers.llm_jax:LoraJax", {"remat": False}),
    PEFT: ("benchmarks.peers.llm_torch:Peft", {"checkpointing": False}),
    f"{PEFT}, checkpointing": ("benchmarks.peers.llm_torch:Peft", {"checkpointing": True}),
}
_QUANTIZED = ("none", "nf4")
_DEFAULT = ("--data", "dialogsum", "--train-examples", "250")


def llm_parser(name: str, description: str | None, epilog: str) -> MeasuringParser:
    """Returns a parser with the options that every comparison of language models has."""
    parser = comparison_parser(name, description)
    parser.epilog = epilog
    parser.add_argument(
        "--sizes",
        choices=SIZES,
        help="random weights in the sizes of this model, with the tokenizer of the packaged one",
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


def check_compared(options: argparse.Namespace) -> None:
    """Checks that PEFT's side can do what the study would be called with.

    Raises:
      InputError: it can't, or lacks a package.
    """
    for package in ("peft", "transformers"):
        check_installed(package, "--group peers")
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


def write_start(folder: str, options: argparse.Namespace, *, steps: int, prompts: int) -> list[int]:
    """Has the files written that all start from, and returns the tokens of each step.

    Args:
      folder: where they are written to.
      options: those of `llm_parser`.
      steps: how many steps to write at most.
      prompts: how many prompts to write at most.
    """
    start = remote("benchmarks.peers.llm_start:Start", options, folder=folder)
    with contextlib.closing(start):
        return start.call(
            "write",
            study_arguments=list(options.study),
            most_steps=steps,
            most_prompts=prompts,
            sizes=options.sizes,
        )


def remote(target: str, options: argparse.Namespace, **arguments: object) -> Remote:
    """Returns an object in a process of its own, with the cores that the options give it."""
    return Remote(target, threads=options.threads, arguments=arguments)
