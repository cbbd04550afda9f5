"""What a training minimises: the loss of answers, or that of preferences."""

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import lora_jax
from experiments.llm.loss import Apply, losses_at_places
from experiments.llm.packing import Batch
from experiments.llm.soft_prompt import without_prompt

Sums = dict[str, Float[Array, ""]]


class Objective(abc.ABC):
    """A loss that is a sum over parts of batches, over how many parts there are.

    Attributes:
      together: how many examples, one after the other, belong together.
    """

    together: ClassVar[int] = 1

    @abc.abstractmethod
    def count(self, batch: Batch) -> Any:
        """Returns how many parts a batch has."""

    @abc.abstractmethod
    def sums(self, apply: Apply, wrapped: Any, base: Any, batch: Batch) -> Sums:
        """Returns sums over the parts of a batch: the `loss`, and what else is measured.

        Args:
          apply: the model's `apply`, without adapters.
          wrapped: the parameters, with adapters or merged.
          base: the parameters without adapters.
          batch: the batch.
        """


@dataclass(frozen=True)
class Answers(Objective):
    """The cross-entropy of the tokens that are learned, each of which counts alike."""

    def count(self, batch: Batch) -> Any:
        """Returns the number of tokens that are learned."""
        return batch.weights.sum()

    def sums(self, apply: Apply, wrapped: Any, base: Any, batch: Batch) -> Sums:
        """Returns the sum of their cross-entropies."""
        return {"loss": losses_at_places(lora_jax.adapt(apply), wrapped, batch).sum()}


@dataclass(frozen=True)
class Preferences(Objective):
    r"""The loss of direct preference optimisation, over pairs of a better and a worse answer.

    With the log-likelihoods $\ell$ of an answer under the model with its adapters and $\ell_0$ with
    them switched off, which is the reference, so that there is no second model,

    $$-\log\sigma\big(\beta\,[(\ell - \ell_0)_{chosen} - (\ell - \ell_0)_{rejected}]\big).$$

    The examples of a batch are pairs, the better answer first.

    Attributes:
      beta: how far the model may go from the reference; less is farther.

    Source: Rafailov et al., Direct Preference Optimization, 2023, equation 7.
    """

    beta: float
    together: ClassVar[int] = 2

    def count(self, batch: Batch) -> Any:
        """Returns the number of pairs."""
        owners = jnp.where(jnp.asarray(batch.weights) > 0, batch.owners, -1)
        return (owners.max(axis=(-2, -1)) + 1).sum() / 2

    def sums(self, apply: Apply, wrapped: Any, base: Any, batch: Batch) -> Sums:
        """Returns the sums of the losses, and of how often the better answer gains more."""
        reference = losses_at_places(lora_jax.adapt(apply), base, without_prompt(batch))
        own = losses_at_places(lora_jax.adapt(apply), wrapped, batch)
        gains = jax.lax.stop_gradient(reference) - own
        # An example learns at a place at least, so that there are no more examples than places.
        most = batch.places.size + batch.places.size % 2
        owners = batch.owners.reshape(-1)
        gain_of = jax.ops.segment_sum(gains.reshape(-1), owners, num_segments=most)
        learned = jax.ops.segment_sum(batch.weights.reshape(-1), owners, num_segments=most)
        chosen, rejected = gain_of.reshape(-1, 2).T
        is_pair = learned.reshape(-1, 2).min(axis=1) > 0
        margins = self.beta * (chosen - rejected)
        losses = jax.nn.softplus(-margins)
        return {
            "loss": jnp.sum(jnp.where(is_pair, losses, 0.0)),
            "accuracy": jnp.sum(is_pair & (margins > 0)).astype(jnp.float32),
        }
