"""What a trained adapter says of new sentences: the command line of `text_lora predict`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

import lora_jax
from experiments.common.errors import InputError
from experiments.common.options import Option, parsed_as
from experiments.common.programs import keep_programs
from experiments.models.bert import Encoder
from experiments.text.adapter_folder import AdapterFolder
from experiments.text.evaluation import batches_of, log_probabilities
from experiments.text.served import Task
from experiments.text.task import classifier_apply

_DESCRIPTION = """\
Prints a line for each sentence: its class, the probability of that class, and the
sentence, separated by tabs. The sentences are those of --text, or the lines of
standard input.
"""

_EXAMPLES = """\
examples:
  python -m experiments.text_lora predict --adapter runs/text_lora/adapter --text "great fun"
  python -m experiments.text_lora predict --adapter runs/text_lora/adapter < sentences.txt
"""


Sentences = Annotated[
    tuple[str, ...] | None,
    Option(
        "a sentence; may be repeated (default: the lines of standard input)",
        repeated=True,
        metavar="SENTENCE",
    ),
]
Model = Annotated[
    Path | None,
    Option("where the encoder is, if not where it was in training", Path, metavar="DIR"),
]


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """What to classify, and with what."""

    adapter: Annotated[
        Path, Option("the folder `adapter` in the --out of a training", Path, metavar="DIR")
    ]
    text: Sentences = None
    model: Model = None
    json: Annotated[bool, Option("print a JSON object in each line")] = False


def parsed_for_prediction(arguments: Sequence[str]) -> PredictOptions:
    """Returns the options after `predict`; exits, as argparse does, if one is wrong."""
    return parsed_as(
        PredictOptions,
        arguments,
        command="text_lora predict",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )


def predict(options: PredictOptions) -> None:
    """Prints the class of each sentence and its probability."""
    keep_programs()
    folder = AdapterFolder(options.adapter)
    card = folder.read_card()
    sentences = sentences_of(options.text)
    encoder = Encoder.read(options.model or card.model_folder)
    merged = lora_jax.merge(Task.read(folder, encoder).wrapped)
    texts = encoder.tokenizer(card.max_length).unlabelled(sentences)
    batches = batches_of(texts, max_length=card.max_length)
    logs = log_probabilities(classifier_apply(encoder.config, len(card.classes)), merged, batches)
    for sentence, row in zip(sentences, np.exp(logs), strict=True):
        label = card.classes[int(row.argmax())]
        print(_line(sentence, label, float(row.max()), as_json=options.json))


def sentences_of(text: Sequence[str] | None) -> list[str]:
    """Returns the sentences of --text, or the lines of standard input that are not blank."""
    lines = sys.stdin.read().splitlines() if text is None else text
    sentences = [line.strip() for line in lines if line.strip()]
    if not sentences:
        raise InputError("there is no sentence; pass --text SENTENCE, or lines on standard input")
    return sentences


def _line(sentence: str, label: str, probability: float, *, as_json: bool) -> str:
    if as_json:
        return json.dumps({"label": label, "probability": probability, "text": sentence})
    return f"{label}\t{probability:.4f}\t{sentence}"
