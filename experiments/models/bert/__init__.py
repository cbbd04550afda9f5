"""A BERT encoder in plain Flax, with weights and a tokenizer in Hugging Face's layout."""

from experiments.models.bert.config import BertConfig as BertConfig
from experiments.models.bert.model import BertClassifier as BertClassifier
from experiments.models.bert.model import BertEncoder as BertEncoder
from experiments.models.bert.model import mean_pooled as mean_pooled
from experiments.models.bert.pretrained import Encoder as Encoder
from experiments.models.bert.pretrained import model_folder as model_folder
from experiments.models.bert.tokenizer import TextTokenizer as TextTokenizer
from experiments.models.bert.weights import encoder_params as encoder_params
from experiments.models.bert.weights import huggingface_modules as huggingface_modules
from experiments.models.bert.weights import with_new_head as with_new_head
