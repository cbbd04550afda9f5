"""Quantised weights: formats, and the node that holds codes and scales."""

from lora_jax.quantization._foreign import ForeignWeight as ForeignWeight
from lora_jax.quantization._foreign import declare as declare
from lora_jax.quantization._tree import dequantize as dequantize
from lora_jax.quantization._weight import QuantizedWeight as QuantizedWeight
