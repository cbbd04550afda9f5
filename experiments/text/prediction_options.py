"""The command line of `text_lora predict`, and the options of all that reads sentences."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.command import Parser

_DESCRIPTION = """\
Prints a line for each sentence: its class, the probability of it, and the sentence,
with tabs in between. Sentences are those of --text, or the lines of standard input.
"""

_EXAMPLES = """\
examples:
  python -m experiments.text_lora predict --adapter runs/text_lora/adapter --text "great fun"
  python -m experiments.text_lora predict --adapter runs/text_lora/adapter < sentences.txt
"""


@dataclass(frozen=True)
class PredictOptions:
    """What to classify, and with what."""

    adapter: Path
    text: tuple[str, ...] | None
    model: Path | None
    json: bool


def parsed_for_prediction(argv: Sequence[str]) -> PredictOptions:
    """Returns the options after `predict`; exits, as argparse does, where one is wrong."""
    values = vars(_parser().parse_args(argv))
    text = values.pop("text")
    return PredictOptions(**values, text=tuple(text) if text else None)


def add_sentence_options(parser: argparse.ArgumentParser) -> None:
    """Adds where sentences come from, and the encoder that reads them."""
    parser.add_argument(
        "--text",
        action="append",
        default=None,
        metavar="SENTENCE",
        help="a sentence; may be repeated (default: the lines of standard input)",
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=None,
        metavar="DIR",
        help="where the encoder is, if not where it was in training",
    )


def _parser() -> Parser:
    options = Parser(
        prog="python -m experiments.text_lora predict",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
    )
    options.add_argument(
        "--adapter",
        type=Path,
        required=True,
        metavar="DIR",
        help="the folder `adapter` of a training's --out",
    )
    add_sentence_options(options)
    options.add_argument("--json", action="store_true", help="print a JSON object in each line")
    return options
