"""The study on language models as a model beside its limit: its own network, loss and rows."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from benchmarks.models import Model, floats
from benchmarks.operations import Factors, Operations
from experiments.llm.loss import losses_at_places
from experiments.llm.methods import ALL_LINEAR
from experiments.llm.packing import Batch, Row, batch_of
from experiments.llm.texts import TokenizedExample
from experiments.models.llama import Llama, LlamaConfig
from experiments.models.shapes import ONE_TOKEN, param_shapes

_SMOLLM2_135M = LlamaConfig(
    model_type="llama",
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1_536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    max_position_embeddings=8_192,
    rms_norm_eps=1e-5,
    rope_theta=100_000.0,
    tie_word_embeddings=True,
)


def language_model(name: str, config: LlamaConfig, batch: Batch, *, remat: bool) -> Model:
    """Returns the study's network, from embedded tokens to the loss of each token it learns.

    Args:
      name: what to call it.
      config: the settings of the network.
      batch: the packed rows.
      remat: whether the backward pass computes each layer again.
    """
    network = Llama(config, remat=remat)

    def apply(operations: Operations, params: Any, embedded: Array) -> Array:
        with nn.intercept_methods(_interceptor(operations, embedded)):
            return losses_at_places(network.apply, params, batch)

    rows, length = batch.tokens.shape
    return Model(
        name=name,
        description=f"{config.num_hidden_layers} layers, embed {config.hidden_size}, "
        f"{rows} × {length} tokens, loss at {batch.places.size} places, float32",
        apply=apply,
        params=param_shapes(network, ONE_TOKEN),
        inputs=floats(rows, length, config.hidden_size),
        targets=ALL_LINEAR,
        rank=8,
        loss=jnp.sum,
    )


def _interceptor(operations: Operations, embedded: Array) -> Callable[..., Any]:
    """Returns what gives the network its embedded tokens, and uses the factors of kernels."""

    def intercepted(call: Any, arguments: Any, options: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__":
            return call(*arguments, **options)
        if isinstance(module, nn.Embed):
            return embedded
        if isinstance(module, nn.Dense | nn.DenseGeneral):
            kernel = module.get_variable("params", "kernel")
            if isinstance(kernel, Factors):
                axes = getattr(module, "axis", -1)
                summed = len(axes) if isinstance(axes, Sequence) else 1
                return operations.project(arguments[0], kernel, summed)
        return call(*arguments, **options)

    return intercepted


def packed_batch(
    vocabulary: int, *, rows: int, length: int, examples: Sequence[int], learned: int
) -> Batch:
    """Returns rows of random tokens that are all filled alike.

    Args:
      vocabulary: how many tokens there are.
      rows: the rows of the batch.
      length: the tokens of a row.
      examples: the tokens of each example of a row.
      learned: how many tokens at the end of each example are learned.
    """
    random = np.random.default_rng(0)
    tokenized = [
        TokenizedExample(
            random.integers(0, vocabulary, own, np.int32), np.arange(own) >= own - learned
        )
        for own in examples
    ]
    row = Row(tuple(range(len(examples))))
    return batch_of(tokenized, [row] * rows, length=length, room=rows * len(examples) * learned)


def smollm2() -> Model:
    """Returns the study with the sizes of SmolLM2-135M, as it trains on DialogSum."""
    config = _SMOLLM2_135M
    # About what two dialogues take, of which the summaries are learned.
    examples = (260, 240)
    batch = packed_batch(config.vocab_size, rows=2, length=512, examples=examples, learned=40)
    return language_model("smollm2", config, batch, remat=True)
