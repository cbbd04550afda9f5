"""Serving many adapters of one model: banks, batches that mix adapters, and weighted sums.

A bank is one tree that holds several adapters, each in a slot; an id names the slot.
"""

from lora_jax.serving._activate import activate as activate
from lora_jax.serving._bank import bank as bank
from lora_jax.serving._bank import ids as ids
from lora_jax.serving._bank import select as select
from lora_jax.serving._batched import adapt as adapt
from lora_jax.serving._changes import add as add
from lora_jax.serving._changes import remove as remove
from lora_jax.serving._changes import replace as replace
