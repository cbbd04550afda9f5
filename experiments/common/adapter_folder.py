"""The best adapter of a training on disk, with a card that says what it belongs to."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import lora_jax
from experiments.common.errors import InputError, as_input_error
from experiments.common.files import write_json

_WEIGHTS = "weights"


@dataclass(frozen=True)
class AdapterFolder:
    """A folder for an adapter and its card; each study has a card of its own.

    Attributes:
      folder: where it is.
      card_type: the dataclass of its cards.
      card_file: the name of the card's file.
    """

    folder: Path
    card_type: ClassVar[Any]
    card_file: ClassVar[str] = "task.json"

    @property
    def weights(self) -> Path:
        return self.folder / _WEIGHTS

    def read_card(self) -> Any:
        path = self.folder / self.card_file
        try:
            return self.card_type(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"--adapter {self.folder} is not the folder of an adapter ({path.name}: {error}); "
                "expected the folder `adapter` of a training's --out"
            ) from error

    def save(self, wrapped: Any, card: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / self.card_file, dataclasses.asdict(card))
        lora_jax.save(self.weights, wrapped, overwrite=True)

    def restore(self, params: Any) -> Any:
        with as_input_error():
            return lora_jax.restore(self.weights, params)


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
