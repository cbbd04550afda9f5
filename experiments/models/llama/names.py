"""What the parameters are called in GGUF files."""

from dataclasses import replace

from experiments.models.llama.config import LlamaConfig
from experiments.models.names import huggingface_rules
from lora_jax.exchange import peft

# The name in a GGUF file of each module of Hugging Face's model.
_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.{layer}.input_layernorm": "blk.{layer}.attn_norm",
    "model.layers.{layer}.self_attn.q_proj": "blk.{layer}.attn_q",
    "model.layers.{layer}.self_attn.k_proj": "blk.{layer}.attn_k",
    "model.layers.{layer}.self_attn.v_proj": "blk.{layer}.attn_v",
    "model.layers.{layer}.self_attn.o_proj": "blk.{layer}.attn_output",
    "model.layers.{layer}.self_attn.q_norm": "blk.{layer}.attn_q_norm",
    "model.layers.{layer}.self_attn.k_norm": "blk.{layer}.attn_k_norm",
    "model.layers.{layer}.post_attention_layernorm": "blk.{layer}.ffn_norm",
    "model.layers.{layer}.mlp.gate_proj": "blk.{layer}.ffn_gate",
    "model.layers.{layer}.mlp.up_proj": "blk.{layer}.ffn_up",
    "model.layers.{layer}.mlp.down_proj": "blk.{layer}.ffn_down",
}


def gguf_rules(config: LlamaConfig) -> list[peft.Rule]:
    """Returns the rules for the names in GGUF files."""
    return [_gguf_rule(rule) for rule in huggingface_rules(config)]


def _gguf_rule(rule: peft.Rule) -> peft.Rule:
    module, _, parameter = rule.name.rpartition(".")
    tied = _GGUF_NAMES["lm_head"] + ".weight" if rule.tied else False
    return replace(rule, name=f"{_GGUF_NAMES[module]}.{parameter}", tied=tied)
