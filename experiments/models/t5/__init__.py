"""T5, T5 1.1 and FLAN-T5 in plain Flax, from Hugging Face's folders."""

from experiments.models.t5.config import T5Config as T5Config
from experiments.models.t5.folder import config_of_folder as config_of_folder
from experiments.models.t5.folder import weights as weights
from experiments.models.t5.model import T5 as T5
