"""The best adapter on disk, with everything that predicting needs besides the encoder."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lora_jax
from experiments.common.errors import InputError, as_input_error
from experiments.common.files import write_json
from experiments.models.bert import Encoder

_WEIGHTS = "weights"
_CARD = "task.json"


@dataclass(frozen=True)
class Card:
    """What an adapter is for.

    Attributes:
      classes: the names of the classes that its head tells apart.
      max_length: how many tokens of a sentence it was trained with.
      model: the encoder's folder, or None for the packaged one.
      model_sha256: the hash of the encoder's weights; no other encoder fits.
      method: how it was trained.
    """

    classes: tuple[str, ...]
    max_length: int
    model: str | None
    model_sha256: str
    method: str

    @property
    def model_folder(self) -> Path | None:
        return Path(self.model) if self.model else None

    def check_encoder(self, encoder: Encoder) -> None:
        if file_hash(encoder.weights_file) != self.model_sha256:
            raise InputError(
                f"the weights in {encoder.folder} are not those that the adapter was trained "
                "beside; pass --model DIR with the folder of those "
                f"(it was {self.model or 'that of the installed package'})"
            )


@dataclass(frozen=True)
class AdapterFolder:
    """A folder for an adapter with its head, and for its card."""

    folder: Path

    @property
    def weights(self) -> Path:
        return self.folder / _WEIGHTS

    def read_card(self) -> Card:
        path = self.folder / _CARD
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return Card(**{**content, "classes": tuple(content["classes"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"--adapter {self.folder} is not the folder of an adapter ({path.name}: {error}); "
                "expected the folder `adapter` of a training's --out"
            ) from error

    def save(self, wrapped: Any, card: Card) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / _CARD, dataclasses.asdict(card))
        lora_jax.save(self.weights, wrapped, overwrite=True)

    def restore(self, params: Any) -> Any:
        with as_input_error():
            return lora_jax.restore(self.weights, params)


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
