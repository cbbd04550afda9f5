"""What LoRA claims of weights and predictions, checked on the numbers themselves."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

import lora_jax
from experiments.common.evaluation import Evaluation

# Two ways of adding the same numbers may tip an example that lies between two classes.
ALIKE = 0.999


class Claim(NamedTuple):
    """A claim, whether it holds, and what was measured to tell."""

    text: str
    holds: bool
    measured: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.measured})" if self.measured else self.text


def weights_claim(is_unchanged: bool) -> Claim:
    """Returns the claim that training leaves the frozen weights alone."""
    return Claim("the frozen weights are bit for bit what they were", is_unchanged)


def predictions_claim(text: str, one: Evaluation, other: Evaluation, at_least: float) -> Claim:
    """Returns the claim that two evaluations have at least this share of predictions in common."""
    same = one.predictions == other.predictions
    return Claim(
        text, float(np.mean(same)) >= at_least, f"{same.sum():,} of {same.size:,} predictions alike"
    )


def check(claims: Iterable[Claim]) -> None:
    """Raises RuntimeError, naming the claims that do not hold, if there are any."""
    broken = [str(claim) for claim in claims if not claim.holds]
    if broken:
        raise RuntimeError(f"not as claimed: {'; '.join(broken)}")


def frozen_unchanged(before: Any, wrapped: Any) -> bool:
    """Returns whether every weight beneath the adapters is bit for bit what it was before."""
    same = jax.tree.map(
        lambda old, new: np.asarray(old).tobytes() == np.asarray(new).tobytes(),
        before,
        lora_jax.unwrap(wrapped),
    )
    return all(jax.tree.leaves(same))


def max_weight_error(wrapped: Any, merged: Any) -> float:
    """Returns how far merged weights are from W + scale·A·B, computed in float64."""

    def error(node: Any, weight: jax.Array) -> float:
        if not isinstance(node, lora_jax.LoRAWeight):
            return 0.0
        base, lora_A, lora_B, scale = (
            np.asarray(part, np.float64)
            for part in (node.base, node.lora_A, node.lora_B, node.scale)
        )
        return float(np.abs(base + scale * (lora_A @ lora_B) - np.asarray(weight)).max())

    errors = jax.tree.map(
        error, wrapped, merged, is_leaf=lambda node: isinstance(node, lora_jax.LoRAWeight)
    )
    return max(jax.tree.leaves(errors))
