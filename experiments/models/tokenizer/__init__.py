"""Texts as tokens, by the tokenizer of a Hugging Face folder or of a GGUF file."""

from experiments.models.tokenizer.chat import ChatTokenizer as ChatTokenizer
from experiments.models.tokenizer.chat import Message as Message
from experiments.models.tokenizer.folder import tokenizer_of_folder as tokenizer_of_folder
from experiments.models.tokenizer.gguf_file import tokenizer_of_gguf as tokenizer_of_gguf
