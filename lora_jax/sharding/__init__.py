"""How a wrapped tree and the state of its optimiser are cut over a mesh of devices."""

from lora_jax.sharding._state import of_state as of_state
from lora_jax.sharding._tree import abstract as abstract
from lora_jax.sharding._tree import of as of
