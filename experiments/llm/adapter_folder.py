"""The best adapter on disk, with everything that writing texts needs besides the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.common import adapter_folder
from experiments.llm.options import ModelOptions
from experiments.models.added_tokens import AddedToken
from experiments.models.pretrained import LanguageModel


@dataclass(frozen=True)
class Card:
    """What an adapter belongs to.

    Attributes:
      model: the folder or file of the model, or None for the packaged one.
      quantize: what its frozen matrices were in training.
      dtype: the dtype of its weights in training.
      method: how it was trained.
      soft_prompt: how many vectors of a soft prompt it has.
      added_tokens: the tokens that were added to the model, each with what it starts from.
    """

    model: str | None
    quantize: str
    dtype: str
    method: str
    soft_prompt: int = 0
    added_tokens: Sequence[tuple[str, str | None]] = ()

    def language_model(self, model: Path | None) -> LanguageModel:
        """Reads the settings of the model of the training, which may have moved to `model`."""
        found = LanguageModel.read(self.model_options(model).model)
        return found.with_tokens([AddedToken(*each) for each in self.added_tokens])

    def model_options(self, model: Path | None) -> ModelOptions:
        """Returns the model of the training, which may have moved to `model`."""
        trained_on = Path(self.model) if self.model else None
        return ModelOptions(model=model or trained_on, quantize=self.quantize, dtype=self.dtype)


class AdapterFolder(adapter_folder.AdapterFolder):
    """A folder for an adapter of a language model, and for its card."""

    card_type = Card
