"""The best adapter on disk, with everything that predicting needs besides the encoder."""

from dataclasses import dataclass
from pathlib import Path

from experiments.common import adapter_folder
from experiments.common.adapter_folder import file_hash
from experiments.common.errors import InputError
from experiments.models.bert import Encoder


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

    def __post_init__(self) -> None:
        """Makes a tuple of what JSON has as a list."""
        object.__setattr__(self, "classes", tuple(self.classes))

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


class AdapterFolder(adapter_folder.AdapterFolder):
    """A folder for an adapter with its head, and for its card."""

    card_type = Card
