"""Llama, Mistral, Qwen 2 and Qwen 3 in plain Flax, from Hugging Face's folders and GGUF files."""

from experiments.models.llama.config import ARCHITECTURES as ARCHITECTURES
from experiments.models.llama.config import Llama3Scaling as Llama3Scaling
from experiments.models.llama.config import LlamaConfig as LlamaConfig
from experiments.models.llama.config import entries_of as entries_of
from experiments.models.llama.folder import config_of_folder as config_of_folder
from experiments.models.llama.folder import weights as weights
from experiments.models.llama.model import Llama as Llama
from experiments.models.llama.names import gguf_rules as gguf_rules
