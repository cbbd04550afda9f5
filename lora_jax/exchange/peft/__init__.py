"""Adapters in the file format of Hugging Face PEFT."""

from lora_jax.exchange.peft._files import read_config as read_config
from lora_jax.exchange.peft._load import Preview as Preview
from lora_jax.exchange.peft._load import load as load
from lora_jax.exchange.peft._load import preview as preview
from lora_jax.exchange.peft._prompts import load_prompt as load_prompt
from lora_jax.exchange.peft._prompts import save_prompt as save_prompt
from lora_jax.exchange.peft._ready import ready_rules as ready_rules
from lora_jax.exchange.peft._rules import Rule as Rule
from lora_jax.exchange.peft._save import save as save
