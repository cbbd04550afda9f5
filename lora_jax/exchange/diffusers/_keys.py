"""How diffusers names the tensors of an adapter, today and before."""

import re

from lora_jax.exchange._module_adapters import Place

# The metadata that says ranks and alphas, as text in JSON.
METADATA = "lora_adapter_metadata"
# The names of the models of a pipeline: a key begins with one, or with none.
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")

_PARTS = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora.down.weight": "lora_A",
    "lora.up.weight": "lora_B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "alpha": "alpha",
}
_NOW = re.compile(rf"(?P<module>.+)\.(?P<part>{'|'.join(map(re.escape, _PARTS))})")
# Keys of attention processors, of before the adapters were in the layers themselves.
_PROCESSOR = re.compile(
    r"(?P<module>.+?)(?:\.processor)?\.to_(?P<layer>q|k|v|out)_lora\.(?P<part>down|up)\.weight"
)


def component_of(key: str) -> str | None:
    """Returns the model of the pipeline that a key begins with, if it does."""
    first = key.partition(".")[0]
    return first if first in COMPONENTS else None


def place_of(key: str) -> Place | None:
    """Returns the place of the tensor with a key, or None where it is no part of an adapter."""
    name = key if component_of(key) is None else key.partition(".")[2]
    old = _PROCESSOR.fullmatch(name)
    if old is not None:
        layer = "to_out.0" if old["layer"] == "out" else f"to_{old['layer']}"
        return f"{old['module']}.{layer}", "lora_A" if old["part"] == "down" else "lora_B"
    now = _NOW.fullmatch(name)
    return None if now is None else (now["module"], _PARTS[now["part"]])
