"""Language models of packages, as they are published, at a small size."""

from collections.abc import Mapping
from typing import Any

import esm2quinox
import jax
import jax.numpy as jnp
from penzai import pz
from penzai.models.transformer.variants import llamalike_common

from tests.models.linen import tokens
from tests.models.model import Call, model

_SIZES = {
    "embedding_dim": 24,
    "projection_dim": 8,
    "mlp_hidden_dim": 48,
    "num_decoder_blocks": 2,
    "vocab_size": 60,
}


def called_penzai(unbound: Any) -> Call:
    """Returns the call `fn(params, ids)` of a Penzai model, with parameters by their names."""
    unbound, variables = pz.unbind_params(unbound, freeze=True)
    params = {variable.label: variable for variable in variables}

    def fn(params: Any, ids: jax.Array) -> jax.Array:
        bound = pz.bind_variables(unbound, list(params.values()))
        return bound(pz.nx.wrap(ids).tag("batch", "seq")).unwrap("batch", "seq", "vocabulary")

    return Call(fn, params, (tokens(2, 6, vocabulary=60),))


def llama_like(**options: Any) -> Any:
    config = llamalike_common.LlamalikeTransformerConfig(**_SIZES, **options)
    return llamalike_common.build_llamalike_transformer(config, jax.random.key(3), "lm")


def penzai(prefix: str, axes: Mapping[str, str]) -> dict[str, str]:
    """Returns the axes by the paths that Penzai's parameters have."""
    return {f"{prefix}/{label}/value/data_array": letters for label, letters in axes.items()}


_GROUPED_QUERIES = {
    "attention/query.weights": "iooo",
    "attention/key.weights": "ioo",
    "attention/value.weights": "ioo",
    "attention/output.weights": "iiio",
    "mlp/gating_linear.weights": "io",
    "mlp/value_linear.weights": "io",
    "mlp/out_linear.weights": "io",
}


@model(
    linear={**penzai("lm/block_0", _GROUPED_QUERIES), **penzai("lm/block_1", _GROUPED_QUERIES)},
    also=penzai("lm", {"embedder.embeddings": "io"}),
    promotion="standard",  # rotary embeddings divide integer positions by floats
)
def penzai_gemma2() -> Call:
    """Gemma 2: sliding-window and global attention by turns, soft caps, a tied head."""
    return called_penzai(
        llama_like(
            num_kv_heads=2,
            query_head_multiplier=2,
            mlp_variant="geglu_approx",
            tie_embedder_and_logits=True,
            attention_type=(
                llamalike_common.AttentionTypeSlidingWindowCausal(4),
                llamalike_common.AttentionTypeGlobalCausal(),
            ),
            use_post_attn_norm=True,
            use_post_ffw_norm=True,
            final_logit_softcap=30.0,
            attn_logits_soft_cap=50.0,
        )
    )


@model(
    linear=penzai("lm/blocks", {name: f"b{axes}" for name, axes in _GROUPED_QUERIES.items()}),
    also=penzai("lm", {"embedder.embeddings": "io", "lm_head.weights": "io"}),
    promotion="standard",  # rotary embeddings divide integer positions by floats
)
def penzai_llama() -> Call:
    """Llama with grouped queries, its layers in a stack."""
    return called_penzai(
        llama_like(
            num_kv_heads=2,
            query_head_multiplier=2,
            mlp_variant="swiglu",
            tie_embedder_and_logits=False,
            use_layer_stack=True,
        )
    )


@model(
    linear={
        f"layers/{name}/weight": "boi"
        for name in (
            *(f"attn/{side}_proj" for side in ("query", "key", "value", "output")),
            "linear1",
            "linear2",
        )
    }
    | {"logit_head/linear1/weight": "oi"},
    also={"logit_head/linear2/weight": "io"},
    promotion="standard",  # token dropout multiplies floats by a quotient of integers
)
def esm2() -> Call:
    """ESM-2, a masked language model of proteins: its head's weight is its embedding."""
    module = esm2quinox.ESM2(
        num_layers=2, embed_size=24, num_heads=4, token_dropout=True, key=jax.random.key(3)
    )
    ids = jnp.asarray(esm2quinox.tokenise(["SP#DERM#N", "SPIDERMAN"]))
    return Call(lambda module, ids: jax.vmap(module)(ids), module, (ids,))
