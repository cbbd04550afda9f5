"""Names of initialisers."""

from lora_jax._paths import listed
from lora_jax.init._gaussian import gaussian
from lora_jax.init._kaiming import kaiming
from lora_jax.init._protocol import Initializer

_BY_NAME: dict[str, Initializer] = {"gaussian": gaussian, "kaiming": kaiming}


def initializer(init: str | Initializer) -> Initializer:
    """Returns the initialiser called `init`, or `init` itself if it is a function.

    Args:
      init: a name, or a function `(key, weight2d, rank, scale) -> (base, lora_A, lora_B)`.

    Returns:
      The initialiser.

    Raises:
      ValueError: it is neither a function nor the name of an initialiser.

    Examples:
      >>> initializer("kaiming").__name__
      'kaiming'
    """
    if callable(init):
        return init
    if not isinstance(init, str) or init not in _BY_NAME:
        raise ValueError(
            f"`init` is {init!r}; expected one of {listed(sorted(_BY_NAME), 20)}, or a function "
            "(key, weight2d, rank, scale) -> (base, lora_A, lora_B)."
        )
    return _BY_NAME[init]
