"""Names of initialisers."""

from typing import Any

from lora_jax._paths import listed
from lora_jax.init._corda import corda
from lora_jax.init._data import DataInitializer
from lora_jax.init._eva import eva
from lora_jax.init._gaussian import gaussian
from lora_jax.init._kaiming import kaiming
from lora_jax.init._loftq import QuantizingInitializer, loftq
from lora_jax.init._lora_ga import lora_ga
from lora_jax.init._mica import mica
from lora_jax.init._olora import olora
from lora_jax.init._orthogonal import orthogonal
from lora_jax.init._pissa import pissa
from lora_jax.init._protocol import Initializer

AnyInitializer = Initializer | DataInitializer | QuantizingInitializer

_BY_NAME: dict[str, AnyInitializer] = {
    "gaussian": gaussian,
    "kaiming": kaiming,
    "loftq": loftq(),
    "mica": mica,
    "olora": olora,
    "orthogonal": orthogonal,
    "pissa": pissa,
}

# Functions that make an initialiser from data, and are not initialisers themselves.
_CALL_WITH_DATA = {
    "corda": (corda, "corda(moments)"),
    "eva": (eva, "eva(moments)"),
    "lora_ga": (lora_ga, "lora_ga(gradients)"),
}


def initializer(init: str | AnyInitializer) -> AnyInitializer:
    """Returns the initialiser called `init`, or `init` itself if it is one.

    Args:
      init: a name, a function `(key, weight2d, rank, scale) -> (base, lora_A, lora_B)`, or a
        `DataInitializer` or a `QuantizingInitializer`, such as `eva` and `loftq` return.

    Returns:
      The initialiser.

    Raises:
      ValueError: it is an unknown name, or not callable.

    Examples:
      >>> initializer("kaiming").__name__
      'kaiming'
    """
    if isinstance(init, DataInitializer | QuantizingInitializer):
        return init
    _check_needs_no_data(init)
    if _is_loftq(init):
        return _BY_NAME["loftq"]
    if callable(init):
        return init
    if not isinstance(init, str) or init not in _BY_NAME:
        raise ValueError(
            f"`init` is {init!r}; expected one of {listed(sorted(_BY_NAME), 20)}, a function "
            "(key, weight2d, rank, scale) -> (base, lora_A, lora_B), or what "
            f"{', '.join(call for _, call in _CALL_WITH_DATA.values())} of lora_jax.init returns."
        )
    return _BY_NAME[init]


def _is_loftq(init: Any) -> bool:
    return init is loftq


def _check_needs_no_data(init: Any) -> None:
    for name, (function, call) in _CALL_WITH_DATA.items():
        if init is function or (isinstance(init, str) and init == name):
            raise ValueError(
                f"`init` is {name!r}, which needs data; expected what it makes of them: "
                f"wrap(..., init=lora_jax.init.{call})."
            )
