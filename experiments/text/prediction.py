"""What a trained adapter says of new sentences."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import lora_jax
from experiments.errors import InputError
from experiments.text.adapter_folder import AdapterFolder
from experiments.text.evaluation import batches_of, log_probabilities
from experiments.text.prediction_options import PredictOptions
from experiments.text.served import Task
from experiments.text.task import Encoder, classifier_apply


def predict(options: PredictOptions) -> None:
    """Prints the class of each sentence and its probability."""
    folder = AdapterFolder(options.adapter)
    card = folder.read_card()
    sentences = sentences_of(options.text)
    encoder = Encoder.read(options.model or (Path(card.model) if card.model else None))
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
