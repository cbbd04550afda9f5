"""Moving adapters back onto the original weights, where an initialiser changed the base."""

from typing import Any

from lora_jax._nodes import NodeIndex
from lora_jax._originals import on_original
from lora_jax._weight import is_lora_weight


def on_original_base(wrapped: Any) -> Any:
    r"""Returns the same model as adapters on the original weights.

    An initialiser such as `pissa` moves a part $s A_0 B_0$ of the weight into the factors. The
    change that training made is then $s A B - s A_0 B_0 = [s A, s A_0]\,[B; -B_0]$: plain LoRA of
    twice the rank, with a scale of 1, on the original weight. Other nodes are kept.

    Args:
      wrapped: what `wrap` returned, trained or not.

    Returns:
      A wrapped tree in which every base is the original weight, to rounding; where a quantised base
      was changed, as an array.

    Source: Meng et al., PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large
    Language Models, 2024, appendix C.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> wrapped = lora_jax.wrap({"kernel": jnp.eye(6)}, "kernel", rank=2, init="pissa")
      >>> lora_jax.arithmetic.on_original_base(wrapped)["kernel"].rank
      4
    """
    return NodeIndex.of(wrapped).mapped_levels(
        lambda _, node: on_original(node) if is_lora_weight(node) else node
    )
