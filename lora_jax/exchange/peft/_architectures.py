"""What the weights of known architectures are called, as data: one table a library.

A weight has a name of its own here, by what it does in the model, such as `"query"`. `NAMES` says
what Hugging Face's checkpoints call it, and `TREES` where a parameter tree has it. Each weight that
both of them have makes a rule.

Source: `transformers` 5.23, the keys of `save_pretrained`; the Flax classes of `transformers` 4.57,
`modeling_flax_*`; `google-tunix` 0.1.7, `tunix.models.*.model` and `params`.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from lora_jax._shapes import Axes
from lora_jax.exchange.peft._rules import Kind


class Leaf(NamedTuple):
    """Where a tree has a weight, its axes where the shape doesn't tell them, and its kind."""

    path: str
    axes: Axes | None = None
    kind: Kind = "linear"


@dataclasses.dataclass(frozen=True)
class Tree:
    """The parameter tree of one architecture in one library.

    Attributes:
      leaves: where each weight is.
      ties: whether the output layer is the embedding: what the architecture's config says unless
        it is set, then what else the tree can be.
      is_shared: whether the embedding is several modules in PyTorch, whatever the output layer is.
    """

    leaves: Mapping[str, Leaf]
    ties: tuple[bool, ...] = (False, True)
    is_shared: bool = False


# --- the names in Hugging Face's checkpoints -----------------------------------------------------

_LAYER = "model.layers.{layer}"
_DECODER = {
    "embedding": "model.embed_tokens.weight",
    "attention_norm": f"{_LAYER}.input_layernorm.weight",
    "query": f"{_LAYER}.self_attn.q_proj.weight",
    "key": f"{_LAYER}.self_attn.k_proj.weight",
    "value": f"{_LAYER}.self_attn.v_proj.weight",
    "attention_out": f"{_LAYER}.self_attn.o_proj.weight",
    "mlp_norm": f"{_LAYER}.post_attention_layernorm.weight",
    "gate": f"{_LAYER}.mlp.gate_proj.weight",
    "up": f"{_LAYER}.mlp.up_proj.weight",
    "down": f"{_LAYER}.mlp.down_proj.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}
_BIASES = {
    "query_bias": f"{_LAYER}.self_attn.q_proj.bias",
    "key_bias": f"{_LAYER}.self_attn.k_proj.bias",
    "value_bias": f"{_LAYER}.self_attn.v_proj.bias",
}
_HEAD_NORMS = {
    "query_norm": f"{_LAYER}.self_attn.q_norm.weight",
    "key_norm": f"{_LAYER}.self_attn.k_norm.weight",
}
_EXPERTS = {
    "router": f"{_LAYER}.mlp.gate.weight",
    "expert_gates": f"{_LAYER}.mlp.experts.{{expert}}.gate_proj.weight",
    "expert_ups": f"{_LAYER}.mlp.experts.{{expert}}.up_proj.weight",
    "expert_downs": f"{_LAYER}.mlp.experts.{{expert}}.down_proj.weight",
}
# Matrices that a tree may have as one leaf.
_FUSED = {
    "key_value": f"{_LAYER}.self_attn.{{projection:k|v}}_proj.weight",
    "query_key_value": f"{_LAYER}.self_attn.{{projection:q|k|v}}_proj.weight",
}
# Gemma normalises what attention and the MLP read, and from its second version on what they write.
_OUTPUT_NORMS = {
    "attention_out_norm": f"{_LAYER}.post_attention_layernorm.weight",
    "mlp_norm": f"{_LAYER}.pre_feedforward_layernorm.weight",
    "mlp_out_norm": f"{_LAYER}.post_feedforward_layernorm.weight",
}
_GEMMA = _DECODER | _FUSED
_QWEN3 = _DECODER | _HEAD_NORMS

# The encoder by itself, and as `bert` in a model with a head. The weights of a module are those of
# its kind: of a dense layer, of a norm, or of an embedding.
_BERT_MODULES = {
    "word": "embeddings.word_embeddings",
    "position": "embeddings.position_embeddings",
    "token_type": "embeddings.token_type_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
    "query": "encoder.layer.{layer}.attention.self.query",
    "key": "encoder.layer.{layer}.attention.self.key",
    "value": "encoder.layer.{layer}.attention.self.value",
    "attention_out": "encoder.layer.{layer}.attention.output.dense",
    "attention_norm": "encoder.layer.{layer}.attention.output.LayerNorm",
    "up": "encoder.layer.{layer}.intermediate.dense",
    "down": "encoder.layer.{layer}.output.dense",
    "output_norm": "encoder.layer.{layer}.output.LayerNorm",
}
_BERT = {
    **{f"{module}.weight": f"{name}.weight" for module, name in _BERT_MODULES.items()},
    **{f"{module}.bias": f"{name}.bias" for module, name in _BERT_MODULES.items()},
}
_BERT_WITH_HEAD = {
    **{f"headed.{weight}": f"bert.{name}" for weight, name in _BERT.items()},
    "classifier.weight": "classifier.weight",
    "classifier.bias": "classifier.bias",
}

# The Flax classes have PyTorch's module names: what is left is the embedding that may be tied.
_SAME_MODULES = {
    "kernel": "{module}.weight",
    "table": "{module}.weight",
    "scale": "{module}.weight",
    "rms_scale": "{module}.weight",
    "bias": "{module}.bias",
}
_FLAX_BERT = {
    "embedding": "bert.embeddings.word_embeddings.weight",
    "head": "cls.predictions.decoder.weight",
    "head_bias": "cls.predictions.bias",
}

# A layer is sublayers by number: attention, in the decoder attention to the encoder, feed-forward.
_T5_ATTENTION = "{stack}.block.{layer}.layer.0"
_T5_CROSS_ATTENTION = "decoder.block.{layer}.layer.1"
_T5_MLPS = {"encoder": "encoder.block.{layer}.layer.1", "decoder": "decoder.block.{layer}.layer.2"}
_T5 = {
    "embedding": "shared.weight",
    "relative_bias": "{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "attention_norm": f"{_T5_ATTENTION}.layer_norm.weight",
    "query": f"{_T5_ATTENTION}.SelfAttention.q.weight",
    "key": f"{_T5_ATTENTION}.SelfAttention.k.weight",
    "value": f"{_T5_ATTENTION}.SelfAttention.v.weight",
    "attention_out": f"{_T5_ATTENTION}.SelfAttention.o.weight",
    "cross_norm": f"{_T5_CROSS_ATTENTION}.layer_norm.weight",
    "cross_query": f"{_T5_CROSS_ATTENTION}.EncDecAttention.q.weight",
    "cross_key": f"{_T5_CROSS_ATTENTION}.EncDecAttention.k.weight",
    "cross_value": f"{_T5_CROSS_ATTENTION}.EncDecAttention.v.weight",
    "cross_out": f"{_T5_CROSS_ATTENTION}.EncDecAttention.o.weight",
    **{f"{stack}_mlp_norm": f"{mlp}.layer_norm.weight" for stack, mlp in _T5_MLPS.items()},
    # One matrix leads into the layer, or the two of a gated one.
    **{f"{stack}_hidden": f"{mlp}.DenseReluDense.wi.weight" for stack, mlp in _T5_MLPS.items()},
    **{f"{stack}_gate": f"{mlp}.DenseReluDense.wi_0.weight" for stack, mlp in _T5_MLPS.items()},
    **{f"{stack}_up": f"{mlp}.DenseReluDense.wi_1.weight" for stack, mlp in _T5_MLPS.items()},
    **{f"{stack}_down": f"{mlp}.DenseReluDense.wo.weight" for stack, mlp in _T5_MLPS.items()},
    "norm": "{stack}.final_layer_norm.weight",
    "head": "lm_head.weight",
}

NAMES: Mapping[str, Mapping[str, str]] = {
    "llama": _DECODER | _SAME_MODULES,
    "mistral": _DECODER | _SAME_MODULES,
    "qwen2": _DECODER | _BIASES,
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3 | _EXPERTS,
    "gemma": _GEMMA | _SAME_MODULES,
    "gemma2": _GEMMA | _OUTPUT_NORMS,
    "gemma3_text": _GEMMA | _OUTPUT_NORMS | _HEAD_NORMS,
    "bert": _BERT | _BERT_WITH_HEAD | _FLAX_BERT | _SAME_MODULES,
    "t5": _T5 | _SAME_MODULES,
}

# --- this project's models -----------------------------------------------------------------------

_STACKED_HEADS: Axes = ("batch", "in", "out", "out")
_STACKED_BIAS: Axes = ("batch", "out", "out")
_STACKED_OUT: Axes = ("batch", "in", "in", "out")
_LORA_JAX_DECODER = {
    "embedding": Leaf("embed/embedding", kind="embedding"),
    "attention_norm": Leaf("layers/attention_norm/scale"),
    "query": Leaf("layers/attention/query/kernel", _STACKED_HEADS),
    "query_bias": Leaf("layers/attention/query/bias", _STACKED_BIAS),
    "query_norm": Leaf("layers/attention/query_norm/scale"),
    "key": Leaf("layers/attention/key/kernel", _STACKED_HEADS),
    "key_bias": Leaf("layers/attention/key/bias", _STACKED_BIAS),
    "key_norm": Leaf("layers/attention/key_norm/scale"),
    "value": Leaf("layers/attention/value/kernel", _STACKED_HEADS),
    "value_bias": Leaf("layers/attention/value/bias", _STACKED_BIAS),
    "attention_out": Leaf("layers/attention/out/kernel", _STACKED_OUT),
    "mlp_norm": Leaf("layers/mlp_norm/scale"),
    "gate": Leaf("layers/mlp/gate/kernel"),
    "up": Leaf("layers/mlp/up/kernel"),
    "down": Leaf("layers/mlp/down/kernel"),
    "norm": Leaf("norm/scale"),
    "head": Leaf("head/kernel"),
}
_LORA_JAX_ENCODER = {
    "word.weight": Leaf("embeddings/word/embedding", kind="embedding"),
    "position.weight": Leaf("embeddings/position/embedding", kind="embedding"),
    "token_type.weight": Leaf("embeddings/token_type/embedding", kind="embedding"),
    "embedding_norm.weight": Leaf("embeddings/norm/scale"),
    "embedding_norm.bias": Leaf("embeddings/norm/bias"),
    "query.weight": Leaf("layer_{layer}/attention/query/kernel"),
    "query.bias": Leaf("layer_{layer}/attention/query/bias"),
    "key.weight": Leaf("layer_{layer}/attention/key/kernel"),
    "key.bias": Leaf("layer_{layer}/attention/key/bias"),
    "value.weight": Leaf("layer_{layer}/attention/value/kernel"),
    "value.bias": Leaf("layer_{layer}/attention/value/bias"),
    "attention_out.weight": Leaf("layer_{layer}/attention/out/kernel"),
    "attention_out.bias": Leaf("layer_{layer}/attention/out/bias"),
    "attention_norm.weight": Leaf("layer_{layer}/attention_norm/scale"),
    "attention_norm.bias": Leaf("layer_{layer}/attention_norm/bias"),
    "up.weight": Leaf("layer_{layer}/up/kernel"),
    "up.bias": Leaf("layer_{layer}/up/bias"),
    "down.weight": Leaf("layer_{layer}/down/kernel"),
    "down.bias": Leaf("layer_{layer}/down/bias"),
    "output_norm.weight": Leaf("layer_{layer}/output_norm/scale"),
    "output_norm.bias": Leaf("layer_{layer}/output_norm/bias"),
}
_LORA_JAX_BERT = {
    **_LORA_JAX_ENCODER,
    **{
        f"headed.{weight}": leaf._replace(path=f"encoder/{leaf.path}")
        for weight, leaf in _LORA_JAX_ENCODER.items()
    },
    "classifier.weight": Leaf("classifier/kernel"),
    "classifier.bias": Leaf("classifier/bias"),
}
_T5_STACK = "{stack:encoder|decoder}"
_LORA_JAX_T5 = {
    "embedding": Leaf("embed/embedding", kind="embedding"),
    "relative_bias": Leaf(f"{_T5_STACK}/relative_bias/embedding", kind="embedding"),
    "attention_norm": Leaf(f"{_T5_STACK}/layers/attention_norm/scale"),
    "query": Leaf(f"{_T5_STACK}/layers/attention/query/kernel", _STACKED_HEADS),
    "key": Leaf(f"{_T5_STACK}/layers/attention/key/kernel", _STACKED_HEADS),
    "value": Leaf(f"{_T5_STACK}/layers/attention/value/kernel", _STACKED_HEADS),
    "attention_out": Leaf(f"{_T5_STACK}/layers/attention/out/kernel", _STACKED_OUT),
    "cross_norm": Leaf("decoder/layers/cross_attention_norm/scale"),
    "cross_query": Leaf("decoder/layers/cross_attention/query/kernel", _STACKED_HEADS),
    "cross_key": Leaf("decoder/layers/cross_attention/key/kernel", _STACKED_HEADS),
    "cross_value": Leaf("decoder/layers/cross_attention/value/kernel", _STACKED_HEADS),
    "cross_out": Leaf("decoder/layers/cross_attention/out/kernel", _STACKED_OUT),
    **{f"{stack}_mlp_norm": Leaf(f"{stack}/layers/mlp_norm/scale") for stack in _T5_MLPS},
    **{
        f"{stack}_{name}": Leaf(f"{stack}/layers/mlp/{name}/kernel")
        for stack in _T5_MLPS
        for name in ("hidden", "gate", "up", "down")
    },
    "norm": Leaf(f"{_T5_STACK}/norm/scale"),
    "head": Leaf("head/kernel"),
}

# --- the Flax classes of transformers 4 ----------------------------------------------------------

# The first rule that fits a leaf counts, so that the embedding stands before the tables.
_FLAX_MODULES = {
    "kernel": Leaf("{module:.+}/kernel"),
    "table": Leaf("{module:.+}/embedding", kind="embedding"),
    "scale": Leaf("{module:.+}/scale"),
    "rms_scale": Leaf("{module:.+}/weight"),
    "bias": Leaf("{module:.+}/bias"),
}
_FLAX_DECODER = {
    "embedding": Leaf("model/embed_tokens/embedding", kind="embedding"),
    "head": Leaf("lm_head/kernel"),
    **_FLAX_MODULES,
}
_FLAX_ENCODER = {
    "embedding": Leaf("bert/embeddings/word_embeddings/embedding", kind="embedding"),
    "head": Leaf("cls/predictions/decoder/kernel"),
    "head_bias": Leaf("cls/predictions/bias"),
    **_FLAX_MODULES,
}
_FLAX_T5 = {
    "embedding": Leaf("shared/embedding", kind="embedding"),
    "head": Leaf("lm_head/kernel"),
    **_FLAX_MODULES,
}

# --- Tunix's models ------------------------------------------------------------------------------

_HEADS: Axes = ("in", "out", "out")
_FROM_HEADS: Axes = ("in", "in", "out")
_TUNIX_DECODER = {
    "embedding": Leaf("embedder/input_embedding", kind="embedding"),
    "attention_norm": Leaf("layers/{layer}/input_layernorm/w"),
    "query": Leaf("layers/{layer}/attn/q_proj/w", _HEADS),
    "query_bias": Leaf("layers/{layer}/attn/q_bias"),
    "query_norm": Leaf("layers/{layer}/attn/q_norm/w"),
    "key": Leaf("layers/{layer}/attn/k_proj/w", _HEADS),
    "key_bias": Leaf("layers/{layer}/attn/k_bias"),
    "key_norm": Leaf("layers/{layer}/attn/k_norm/w"),
    "value": Leaf("layers/{layer}/attn/v_proj/w", _HEADS),
    "value_bias": Leaf("layers/{layer}/attn/v_bias"),
    "attention_out": Leaf("layers/{layer}/attn/o_proj/w", _FROM_HEADS),
    "mlp_norm": Leaf("layers/{layer}/post_attention_layernorm/w"),
    "gate": Leaf("layers/{layer}/mlp/gate_proj/kernel"),
    "up": Leaf("layers/{layer}/mlp/up_proj/kernel"),
    "down": Leaf("layers/{layer}/mlp/down_proj/kernel"),
    "router": Leaf("layers/{layer}/mlp/router/kernel"),
    "expert_gates": Leaf("layers/{layer}/mlp/gate_proj"),
    "expert_ups": Leaf("layers/{layer}/mlp/up_proj"),
    "expert_downs": Leaf("layers/{layer}/mlp/down_proj"),
    "norm": Leaf("final_norm/w"),
    "head": Leaf("lm_head/w"),
}
# With as many heads of keys as of queries, the three are one leaf.
_TUNIX_GEMMA = {
    "embedding": Leaf("embedder/input_embedding", kind="embedding"),
    "attention_norm": Leaf("layers/{layer}/pre_attention_norm/scale"),
    "query": Leaf("layers/{layer}/attn/q_einsum/w", ("out", "in", "out")),
    "query_norm": Leaf("layers/{layer}/attn/_query_norm/scale"),
    "key_norm": Leaf("layers/{layer}/attn/_key_norm/scale"),
    "key_value": Leaf("layers/{layer}/attn/kv_einsum/w", ("batch", "out", "in", "out")),
    "query_key_value": Leaf("layers/{layer}/attn/qkv_einsum/w", ("batch", "out", "in", "out")),
    "attention_out": Leaf("layers/{layer}/attn/attn_vec_einsum/w", _FROM_HEADS),
    "mlp_norm": Leaf("layers/{layer}/pre_ffw_norm/scale"),
    "gate": Leaf("layers/{layer}/mlp/gate_proj/kernel"),
    "up": Leaf("layers/{layer}/mlp/up_proj/kernel"),
    "down": Leaf("layers/{layer}/mlp/down_proj/kernel"),
    "mlp_out_norm": Leaf("layers/{layer}/post_ffw_norm/scale"),
    "norm": Leaf("final_norm/scale"),
}
_TUNIX_GEMMA2 = {
    **_TUNIX_GEMMA,
    "attention_out_norm": Leaf("layers/{layer}/post_attn_norm/scale"),
}
_TUNIX_GEMMA3 = {
    **_TUNIX_GEMMA,
    "attention_out_norm": Leaf("layers/{layer}/post_attention_norm/scale"),
}

# --- all of them ---------------------------------------------------------------------------------

_TIED_ALONE, _TIED_FIRST, _UNTIED_ALONE = (True,), (True, False), (False,)

TREES: Mapping[tuple[str, str], Tree] = {
    ("llama", "lora_jax"): Tree(_LORA_JAX_DECODER),
    ("mistral", "lora_jax"): Tree(_LORA_JAX_DECODER),
    ("qwen2", "lora_jax"): Tree(_LORA_JAX_DECODER),
    ("qwen3", "lora_jax"): Tree(_LORA_JAX_DECODER),
    ("bert", "lora_jax"): Tree(_LORA_JAX_BERT, _UNTIED_ALONE),
    ("t5", "lora_jax"): Tree(_LORA_JAX_T5, _TIED_FIRST, is_shared=True),
    ("llama", "flax"): Tree(_FLAX_DECODER, _UNTIED_ALONE),
    ("mistral", "flax"): Tree(_FLAX_DECODER, _UNTIED_ALONE),
    ("gemma", "flax"): Tree(_FLAX_DECODER, _TIED_FIRST),
    ("bert", "flax"): Tree(_FLAX_ENCODER, _TIED_FIRST),
    ("t5", "flax"): Tree(_FLAX_T5, _TIED_FIRST, is_shared=True),
    ("llama", "tunix"): Tree(_TUNIX_DECODER),
    ("qwen2", "tunix"): Tree(_TUNIX_DECODER),
    ("qwen3", "tunix"): Tree(_TUNIX_DECODER),
    ("qwen3_moe", "tunix"): Tree(_TUNIX_DECODER),
    ("gemma", "tunix"): Tree(_TUNIX_GEMMA, _TIED_ALONE),
    ("gemma2", "tunix"): Tree(_TUNIX_GEMMA2, _TIED_ALONE),
    ("gemma3_text", "tunix"): Tree(_TUNIX_GEMMA3, _TIED_ALONE),
}
