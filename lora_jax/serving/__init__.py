"""Many adapters of one model: in one batch, in one sum, or made into one."""

from lora_jax.serving._activate import activate as activate
from lora_jax.serving._bank import add_adapter as add_adapter
from lora_jax.serving._bank import remove_adapter as remove_adapter
from lora_jax.serving._bank import replace_adapter as replace_adapter
from lora_jax.serving._batched import adapt_batched as adapt_batched
from lora_jax.serving._combine import combine_adapters as combine_adapters
from lora_jax.serving._stack import adapter_ids as adapter_ids
from lora_jax.serving._stack import select as select
from lora_jax.serving._stack import stack as stack
