"""The study on text in PyTorch: the same encoder from `transformers`, with PEFT's adapters."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from torch import Tensor, nn

from benchmarks.peers.batches import read_batches
from benchmarks.peers.torch_training import TorchTraining


class Classifier(nn.Module):
    """The encoder, the mean over each sentence's tokens, and a linear layer."""

    def __init__(self, config: transformers.BertConfig, model: str, classes: int) -> None:
        """Reads the encoder's weights from the folder `model`."""
        super().__init__()
        self.encoder = transformers.BertModel.from_pretrained(
            model, config=config, add_pooling_layer=False
        )
        rate = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if rate is None else rate)
        self.classifier = nn.Linear(config.hidden_size, classes)

    def forward(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Returns the logits."""
        hidden = self.encoder(token_ids, attention_mask=mask).last_hidden_state
        kept = mask[..., None].to(hidden.dtype)
        pooled = (hidden * kept).sum(dim=-2) / kept.sum(dim=-2).clamp(min=1)
        return self.classifier(self.dropout(pooled))


class Peft(TorchTraining):
    """PEFT's training of that classifier, with the optimiser that the study has."""

    def __init__(self, folder: str, dropout: bool) -> None:
        """Reads what `benchmarks.peers.text_start.Start` wrote."""
        self._folder = Path(folder)
        start = json.loads((self._folder / "start.json").read_text(encoding="utf-8"))
        super().__init__(start)
        self._config = transformers.BertConfig.from_pretrained(start["model"])
        if not dropout:
            self._config.hidden_dropout_prob = 0.0
            self._config.attention_probs_dropout_prob = 0.0
            self._config.classifier_dropout = 0.0

    def begin(self, seed: int) -> None:
        """Takes the adapter and the batches of this seed."""
        torch.manual_seed(seed)
        folder = self._folder / f"seed_{seed}"
        self.load(str(folder / "adapter"))
        self.train(self._model, read_batches(folder / "batches.npz"))

    def load(self, folder: str) -> None:
        """Takes an adapter in PEFT's format."""
        classifier = Classifier(self._config, self._start["model"], self._start["classes"])
        self._model = peft.PeftModel.from_pretrained(classifier, folder, is_trainable=True)

    def save(self, folder: str) -> None:
        """Writes the adapter, with its head, as PEFT does."""
        self._model.save_pretrained(folder)

    def warm_up(self) -> None:
        """Computes a gradient for a batch of every length, and drops it."""
        of_length = {batch["mask"].shape[1]: batch for batch in self._batches}
        self.try_batches(list(of_length.values()))

    def add_gradients(self, batch: Mapping[str, Any]) -> float:
        """Adds the gradients of a batch, and returns its loss."""
        labels = torch.from_numpy(batch["labels"]).long()
        loss = nn.functional.cross_entropy(self._model(*_inputs(batch)), labels)
        loss.backward()
        return loss.item()

    def test(self, path: str) -> float:
        """Returns the accuracy on the test sentences; log-probabilities of classes go to `path`."""
        self._model.eval()
        batches = read_batches(self._folder / "test.npz")
        rows = np.concatenate([batch["rows"] for batch in batches])
        with torch.inference_mode():
            logits = torch.cat([self._model(*_inputs(batch)) for batch in batches])
        logs = np.empty((rows.max() + 1, logits.shape[1]), np.float32)
        labels = np.empty(rows.max() + 1, np.int32)
        is_sentence = rows >= 0
        logs[rows[is_sentence]] = logits.log_softmax(dim=-1).numpy()[is_sentence]
        given = np.concatenate([batch["labels"] for batch in batches])
        labels[rows[is_sentence]] = given[is_sentence]
        np.save(path, logs)
        return float((logs.argmax(axis=-1) == labels).mean())


def _inputs(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(batch["token_ids"]).long(), torch.from_numpy(batch["mask"]).long()
