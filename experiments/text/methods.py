"""Which weights train: adapters and the head, every weight, or the head alone.

All methods give a tree of the same kind, so that one training loop, one checkpoint and one file
format serve them all: a weight that trains in full is a `FullWeight`, with or without adapters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

import lora_jax
from experiments.common import method
from experiments.common.errors import as_input_error

METHODS = ("lora", "dora", "full", "head")

_HEAD = "classifier"
_ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Method(method.Method):
    """A way to fine-tune a classifier."""

    learning_rates: ClassVar = {"lora": 2e-3, "dora": 2e-3, "full": 1e-4, "head": 1e-2}

    def wrapped(
        self,
        params: Any,
        apply_fn: Callable[..., Any],
        *,
        targets: Sequence[str],
        alpha: float | None,
        key: PRNGKeyArray,
    ) -> Any:
        """Returns `params` with what this method trains.

        Raises:
          InputError: `lora_jax.wrap` refuses the targets or a setting; its message says why.
        """
        if self.rank is None:
            return _trained_in_full(params, "" if self.name == "full" else _HEAD)
        is_linear = _ALL_LINEAR in targets
        with as_input_error():
            return lora_jax.wrap(
                params,
                _ALL_LINEAR if list(targets) == [_ALL_LINEAR] else tuple(targets),
                rank=self.rank,
                alpha=alpha,
                key=key,
                axes=_axes(apply_fn, params) if is_linear else None,
                dora=self.name == "dora",
                train=_HEAD,
            )


def without_adapters(wrapped: Any) -> Any:
    """Returns plain params with the adapters removed and the trained head."""
    return {**lora_jax.unwrap(wrapped), _HEAD: lora_jax.merge(wrapped)[_HEAD]}


def _trained_in_full(params: Any, module: str) -> Any:
    if module:
        return {**params, module: _trained_in_full(params[module], "")}
    return jax.tree.map(lambda leaf: lora_jax.FullWeight(base=leaf, value=leaf), params)


def _axes(apply_fn: Callable[..., Any], params: Any) -> Any:
    tokens, mask = np.zeros((1, 2), np.int32), np.ones((1, 2), np.bool_)
    return lora_jax.infer_axes(lambda params: apply_fn({"params": params}, tokens, mask), params)
