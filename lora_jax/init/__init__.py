"""Initialisers: how the factors of a new adapter, and its base, come about."""

from lora_jax.init._gaussian import gaussian as gaussian
from lora_jax.init._kaiming import kaiming as kaiming
from lora_jax.init._protocol import Frozen as Frozen
from lora_jax.init._protocol import Initializer as Initializer
from lora_jax.init._registry import initializer as initializer
