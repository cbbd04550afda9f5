"""Which weights train: adapters beside the linear layers, or every weight."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
from jaxtyping import PRNGKeyArray

import lora_jax
from experiments.common import method
from experiments.common.errors import as_input_error
from experiments.models.added_tokens import TABLES
from experiments.models.names import huggingface_rules
from experiments.models.pretrained import Config
from lora_jax.exchange import peft

METHODS = ("lora", "dora", "full", "none")

# The kernels of attention and of the feed-forward layers. Adapters of attention alone learn less
# (Schulman et al., LoRA Without Regret, 2025).
ALL_LINEAR = r"(\w+/)?layers/(attention|cross_attention|mlp)/\w+/kernel"


def with_rows(wrapped: Any, ids: Sequence[int]) -> Any:
    """Returns a tree in which the embeddings of these tokens train too, on top of what does.

    Raises:
      InputError: `lora_jax.wrap` refuses them, as beside DoRA of the same table.
    """
    # The axis of the tokens is that of the rows, in the output layer too.
    axes = {
        "/".join(path): ("in", "out") if axis == 0 else ("out", "in")
        for path, axis in TABLES.items()
        if path[0] in wrapped
    }
    with as_input_error():
        return lora_jax.wrap(wrapped, {path: {"rows": list(ids)} for path in axes}, axes=axes)


@dataclass(frozen=True)
class Method(method.Method):
    """A way to fine-tune a language model."""

    # Adapters take about ten times the learning rate of full fine-tuning (the same source).
    # What trains beside nothing is a soft prompt, which takes another ten times.
    learning_rates: ClassVar = {"lora": 1e-3, "dora": 1e-3, "full": 1e-4, "none": 1e-2}

    def wrapped(
        self,
        params: Any,
        config: Config,
        *,
        targets: Sequence[str],
        alpha: float | None,
        key: PRNGKeyArray,
    ) -> Any:
        """Returns `params` with what this method trains.

        Raises:
          InputError: `lora_jax.wrap` refuses the targets or a setting; its message says why.
        """
        if self.name == "none":
            return params
        if self.rank is None:
            return jax.tree.map(lambda leaf: lora_jax.FullWeight(base=leaf, value=leaf), params)
        with as_input_error():
            axes = peft.preview(params, names=huggingface_rules(config)).axes
            return lora_jax.wrap(
                params,
                tuple(targets),
                rank=self.rank,
                alpha=alpha,
                key=key,
                axes=axes,
                dora=self.name == "dora",
            )
