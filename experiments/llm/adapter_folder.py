"""The best adapter on disk, with everything that writing texts needs besides the model."""

from dataclasses import dataclass
from pathlib import Path

from experiments.common import adapter_folder
from experiments.llm.options import ModelOptions


@dataclass(frozen=True)
class Card:
    """What an adapter belongs to.

    Attributes:
      model: the folder or file of the model, or None for the packaged one.
      quantize: what its frozen matrices were in training.
      dtype: the dtype of its weights in training.
      method: how it was trained.
      soft_prompt: how many vectors of a soft prompt it has.
    """

    model: str | None
    quantize: str
    dtype: str
    method: str
    soft_prompt: int = 0

    def model_options(self, model: Path | None) -> ModelOptions:
        """Returns the model of the training, which may have moved to `model`."""
        trained_on = Path(self.model) if self.model else None
        return ModelOptions(model=model or trained_on, quantize=self.quantize, dtype=self.dtype)


class AdapterFolder(adapter_folder.AdapterFolder):
    """A folder for an adapter of a language model, and for its card."""

    card_type = Card
