"""The transform: from a function of parameters to one of wrapped parameters."""

from lora_jax.transform._adapt import adapt as adapt
from lora_jax.transform._report import MaterializationError as MaterializationError
from lora_jax.transform._report import MaterializationWarning as MaterializationWarning
