"""Optax transformations that know which of the leaves are an adapter's two factors."""

from lora_jax.updates._lora_fa import lora_fa as lora_fa
from lora_jax.updates._lora_plus import lora_plus as lora_plus
from lora_jax.updates._riemannian import riemannian as riemannian
