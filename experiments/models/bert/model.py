"""BERT (Devlin et al., 2018) as plain Flax modules that know nothing of LoRA.

Every kernel is the transpose of one linear layer of Hugging Face's model:
`layer_0/attention/query/kernel` is `encoder.layer.0.attention.self.query.weight`.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from experiments.models.bert.config import BertConfig
from experiments.models.bert.layers import Dropout, LayerNorm, softmax
from experiments.models.layers import ACTIVATIONS

TokenIds = Int[Array, "batch length"]
Mask = Bool[Array, "batch length"]
Hidden = Float[Array, "batch length width"]


class BertEmbeddings(nn.Module):
    """A vector for each token: its word's, its position's and its segment's, normalised."""

    config: BertConfig

    @nn.compact
    def __call__(self, token_ids: TokenIds, token_types: TokenIds, deterministic: bool) -> Hidden:
        config, width = self.config, self.config.hidden_size
        positions = jnp.arange(token_ids.shape[-1])
        hidden = (
            nn.Embed(config.vocab_size, width, name="word")(token_ids)
            + nn.Embed(config.max_position_embeddings, width, name="position")(positions)
            + nn.Embed(config.type_vocab_size, width, name="token_type")(token_types)
        )
        return _dropped(
            config, LayerNorm(config.layer_norm_eps, name="norm")(hidden), deterministic
        )


class BertAttention(nn.Module):
    """Every token looks at the tokens that the mask lets it see, with several heads."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: Hidden, mask: Mask, deterministic: bool) -> Hidden:
        config = self.config
        query, key, value = (
            self._heads(nn.Dense(config.hidden_size, name=name)(hidden))
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
        # Not minus infinity: in a row that only fills the batch, every token is masked.
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
        shares = Dropout(config.attention_probs_dropout_prob)(softmax(scores), deterministic)
        seen = jnp.einsum("bhqk,bkhd->bqhd", shares, value)
        return nn.Dense(config.hidden_size, name="out")(seen.reshape(hidden.shape))

    def _heads(self, x: Hidden) -> Float[Array, "batch length heads head"]:
        return x.reshape(*x.shape[:-1], self.config.num_attention_heads, -1)


class BertLayer(nn.Module):
    """Attention, then two dense layers, each added to what came in and normalised."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: Hidden, mask: Mask, deterministic: bool) -> Hidden:
        config = self.config
        seen = BertAttention(config, name="attention")(hidden, mask, deterministic)
        seen = _dropped(config, seen, deterministic)
        hidden = LayerNorm(config.layer_norm_eps, name="attention_norm")(hidden + seen)
        wide = ACTIVATIONS[config.hidden_act](nn.Dense(config.intermediate_size, name="up")(hidden))
        narrow = nn.Dense(config.hidden_size, name="down")(wide)
        narrow = _dropped(config, narrow, deterministic)
        return LayerNorm(config.layer_norm_eps, name="output_norm")(hidden + narrow)


class BertEncoder(nn.Module):
    """Tokens in, a vector for each of them out; `layer_0`, `layer_1`, ... in between."""

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        token_ids: TokenIds,
        mask: Mask,
        token_types: TokenIds | None = None,
        *,
        deterministic: bool = True,
    ) -> Hidden:
        """Returns the last hidden states.

        Args:
          token_ids: the tokens; each row is padded with any token.
          mask: which of them are tokens, and which are padding.
          token_types: the segment of each token: 0, or 1 in the second of two sentences.
          deterministic: whether dropout is off; if it is on, pass `rngs={"dropout": key}`.
        """
        config = self.config
        if token_types is None:
            token_types = jnp.zeros_like(token_ids)
        embeddings = BertEmbeddings(config, name="embeddings")
        hidden = embeddings(token_ids, token_types, deterministic)
        for number in range(config.num_hidden_layers):
            hidden = BertLayer(config, name=f"layer_{number}")(hidden, mask, deterministic)
        return hidden


class BertClassifier(nn.Module):
    """The encoder, the mean over each sentence's tokens, and a linear layer `classifier`."""

    config: BertConfig
    classes: int

    @nn.compact
    def __call__(
        self,
        token_ids: TokenIds,
        mask: Mask,
        token_types: TokenIds | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "batch classes"]:
        encoder = BertEncoder(self.config, name="encoder")
        hidden = encoder(token_ids, mask, token_types, deterministic=deterministic)
        pooled = mean_pooled(hidden, mask)
        pooled = Dropout(self.config.head_dropout)(pooled, deterministic)
        return nn.Dense(self.classes, name="classifier")(pooled)


def mean_pooled(hidden: Hidden, mask: Mask) -> Float[Array, "batch width"]:
    """Returns the mean over the tokens of each row; zeros if a row has none."""
    kept = mask[..., None].astype(hidden.dtype)
    return (hidden * kept).sum(axis=-2) / jnp.maximum(kept.sum(axis=-2), 1)


def _dropped(config: BertConfig, hidden: Hidden, deterministic: bool) -> Hidden:
    return Dropout(config.hidden_dropout_prob)(hidden, deterministic)
