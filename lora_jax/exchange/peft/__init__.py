"""Adapters in the file format of Hugging Face PEFT."""

from lora_jax.exchange.peft._config import read_config as read_config
from lora_jax.exchange.peft._load import load as load
from lora_jax.exchange.peft._preview import Preview as Preview
from lora_jax.exchange.peft._preview import preview as preview
from lora_jax.exchange.peft._rules import Rule as Rule
from lora_jax.exchange.peft._save import save as save
