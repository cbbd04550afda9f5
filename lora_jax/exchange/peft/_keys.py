"""The keys of an adapter file: which module they belong to, and which part of it they are."""

import dataclasses
import re
from typing import Literal

Part = Literal["lora_A", "lora_B", "magnitude", "weight", "base", "unused", "unknown"]

PREFIX = "base_model.model."
BASE_LAYER = ".base_layer"

_SUFFIXES: dict[str, tuple[Part, bool]] = {
    "lora_A.weight": ("lora_A", False),
    "lora_B.weight": ("lora_B", False),
    "lora_embedding_A": ("lora_A", True),
    "lora_embedding_B": ("lora_B", True),
    "lora_magnitude_vector": ("magnitude", False),
    "lora_magnitude_vector.weight": ("magnitude", False),
}
_ADAPTED = re.compile(
    rf"(?P<module>.+?)(?P<wrappers>(?:{re.escape(BASE_LAYER)})*)"
    rf"\.(?P<suffix>{'|'.join(map(re.escape, _SUFFIXES))})"
)


@dataclasses.dataclass(frozen=True)
class Key:
    """What a tensor of an adapter file is.

    Attributes:
      name: the adapted module, or for a weight the PyTorch parameter.
      part: a part of an adapter; a `"weight"` that was trained in full; a copy of a `"base"`
        weight; `"unused"` where PEFT doesn't compute with it; or `"unknown"`.
      is_embedding: whether an embedding was adapted.
      depth: how many adapters of the module's own parameters are around this one.
    """

    name: str
    part: Part
    is_embedding: bool = False
    depth: int = 0


def parsed(key: str) -> Key:
    """Returns what the tensor with this key is."""
    name = key.removeprefix(PREFIX)
    adapted = _ADAPTED.fullmatch(name)
    if adapted is not None:
        part, is_embedding = _SUFFIXES[adapted["suffix"]]
        depth = adapted["wrappers"].count(BASE_LAYER)
        return Key(adapted["module"], part, is_embedding, depth)
    if re.search(r"(^|\.)lora_", name):
        return Key(name, "unknown")
    # With bias="all", PEFT also writes the biases inside of the wrappers of `modules_to_save`.
    if ".original_module." in name:
        return Key(name, "unused")
    plain = name.replace(BASE_LAYER, "").replace(".modules_to_save.", ".")
    is_base = plain != name and BASE_LAYER in name and not name.endswith(".bias")
    return Key(plain, "base" if is_base else "weight")


def adapter_key(module: str, part: Part, *, is_embedding: bool, depth: int) -> str:
    """Returns the key of a part of an adapter."""
    suffix = next(
        suffix
        for suffix, (own, embedding) in _SUFFIXES.items()
        if own == part and (embedding == is_embedding or part == "magnitude")
    )
    return f"{PREFIX}{module}{BASE_LAYER * depth}.{suffix}"


def bias_key(module: str, *, wrappers: int) -> str:
    """Returns the key of a module's bias, with that many adapters around the module."""
    return f"{PREFIX}{module}{BASE_LAYER * wrappers}.bias"
