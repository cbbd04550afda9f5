"""Llama, Mistral, Qwen 2 and Qwen 3 in plain Flax, from Hugging Face's folders and GGUF files."""

from experiments.models.llama.cache import Cache as Cache
from experiments.models.llama.config import Llama3Scaling as Llama3Scaling
from experiments.models.llama.config import LlamaConfig as LlamaConfig
from experiments.models.llama.generate import Sampling as Sampling
from experiments.models.llama.generate import generate as generate
from experiments.models.llama.generate import read_prompts as read_prompts
from experiments.models.llama.generate import read_token as read_token
from experiments.models.llama.model import Llama as Llama
from experiments.models.llama.names import gguf_rules as gguf_rules
from experiments.models.llama.names import huggingface_rules as huggingface_rules
from experiments.models.llama.pretrained import LanguageModel as LanguageModel
from experiments.models.llama.tokenizer import ChatTokenizer as ChatTokenizer
