"""The variants of LoRA that the study of ranks compares."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax
import optax

import lora_jax
from experiments.common.errors import as_input_error
from experiments.mnist.network import LAYERS, NETWORK


@dataclass(frozen=True)
class Method:
    """A variant of LoRA.

    Attributes:
      label: its name in tables and pictures.
      settings: arguments of `lora_jax.wrap` besides rank, alpha and key.
      faster_B: whether lora_B has a higher learning rate than lora_A.
    """

    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    faster_B: bool = False


METHODS: Mapping[str, Method] = {
    "lora": Method("LoRA"),
    "rslora": Method("rsLoRA", {"rslora": True}),
    "dora": Method("DoRA", {"dora": True}),
    "pissa": Method("PiSSA", {"init": "pissa"}),
    "lora_plus": Method("LoRA+", faster_B=True),
}


def with_adapters(params: Any, method: str, rank: int, alpha: float, key: jax.Array) -> Any:
    """Returns `params` with adapters of this kind on every layer."""
    with as_input_error():
        return lora_jax.wrap(
            params,
            {layer: {"rank": _rank_of(layer, rank)} for layer in LAYERS},
            alpha=alpha,
            key=key,
            **METHODS[method].settings,
        )


# One object for the same optimiser, so that what was compiled for it is found again.
@cache
def optimizer(learning_rate: float, ratio: float | None) -> optax.GradientTransformation:
    """Returns Adam for the adapters, with lora_B's learning rate `ratio` times lora_A's."""
    adam = optax.adam(learning_rate)
    if ratio is None:
        return lora_jax.optimizer(adam)
    return lora_jax.optimizer(optax.chain(adam, lora_jax.updates.lora_plus(ratio=ratio)))


def _rank_of(layer: str, rank: int) -> int:
    """Returns the rank of a layer: that of the output layer is at most its ten columns."""
    return min(rank, NETWORK.classes) if layer == "output" else rank
