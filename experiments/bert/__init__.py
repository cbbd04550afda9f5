"""A BERT encoder in plain Flax, with weights and a tokenizer in Hugging Face's layout."""

from experiments.bert.config import BertConfig as BertConfig
from experiments.bert.folder import model_folder as model_folder
from experiments.bert.model import BertClassifier as BertClassifier
from experiments.bert.model import BertEncoder as BertEncoder
from experiments.bert.model import mean_pooled as mean_pooled
from experiments.bert.tokenizer import TextTokenizer as TextTokenizer
from experiments.bert.weights import encoder_params as encoder_params
from experiments.bert.weights import huggingface_modules as huggingface_modules
from experiments.bert.weights import with_new_head as with_new_head
