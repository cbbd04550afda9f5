"""What diffusers calls the parameters of a U-Net."""

import re
from typing import Any

import jax

from lora_jax.exchange import peft

# Modules that are lists in diffusers: a number follows their name.
_LISTS = (
    "attentions",
    "down_blocks",
    "downsamplers",
    "net",
    "resnets",
    "to_out",
    "transformer_blocks",
    "up_blocks",
    "upsamplers",
)
_NUMBERED = re.compile(rf"\b({'|'.join(_LISTS)})_(\d+)\b")
_PARAMETERS = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def diffusers_rules(shapes: Any) -> list[peft.Rule]:
    """Returns a rule for each parameter of a U-Net.

    Args:
      shapes: its parameters, or their shapes.
    """
    return [_rule(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)]


def _rule(keys: Any, leaf: Any) -> peft.Rule:
    path = "/".join(key.key for key in keys)
    module, _, parameter = path.rpartition("/")
    name = _NUMBERED.sub(r"\1.\2", module).replace("/", ".")
    is_conv = parameter == "kernel" and len(leaf.shape) == 4
    return peft.Rule(
        f"{name}.{_PARAMETERS[parameter]}",
        path,
        kind="conv" if is_conv else "linear",
        axes=("in", "in", "in", "out") if is_conv else None,
    )
