"""Leaves that are two parameters in PyTorch: an embedding, and the output layer that shares it.

An adapter of such a leaf acts in both uses. PEFT adapts modules: one of the two, or each by an
adapter of its own. Where `ensure_weight_tying` has tied them, they are one change of the shared
weight W (vocabulary, dim): with A' (r, vocabulary) and B' (dim, r) of the embedding, and A (r, dim)
and B (vocabulary, r) of the output layer,

    ΔW = s · A'ᵀ B'ᵀ = s · B A    with    A = B'ᵀ  and  B = A'ᵀ.

DoRA's norms are over the vocabulary in one and over dim in the other, so its magnitudes have no
such form.

Source: peft.tuners.lora.model.LoraModel of 0.21.2, `_create_and_replace`, `_add_targets_to_tie`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lora_jax._row_selection import selects_rows
from lora_jax._weight import is_adapter_node, is_lora_weight
from lora_jax.exchange.peft._files import Tensors, rank_of, scale_of
from lora_jax.exchange.peft._names import NamedLeaf, NamedTree, Part

_OF_ITS_OWN = "a model that has a leaf for each of the two takes any adapter of them"


def parts_of_other(parts: Mapping[Part, np.ndarray]) -> dict[Part, np.ndarray]:
    """Returns the parts of the other parameter's adapter, where both change the weight alike."""
    return {"lora_A": parts["lora_B"].T, "lora_B": parts["lora_A"].T}


def tied_in_file(
    config: Mapping[str, Any],
    tensors: Tensors,
    named: NamedLeaf,
    own: Mapping[str, str],
    other: Mapping[str, str],
) -> Iterator[str]:
    """Says why what a file holds of two parameters, by the keys of each, is not one leaf's."""
    if not named.rule.tied or not (own or other):
        return
    both = f"'{named.name(())}' and {_quoted(named.tied_name)}"
    if set(own) != set(other):
        verb = "trains" if "weight" in {**own, **other} else "adapts"
        found = named.name(()) if own else named.tied_name
        yield (
            f"the file {verb} only '{found}' of {both}, and '{named.path}' is both "
            f"(tied={named.rule.tied!r}), so both would change. With `ensure_weight_tying` "
            f"PEFT {verb} both alike"
            f"{_naming(named) if named.tied_name is None else ''}; {_OF_ITS_OWN}."
        )
    elif "magnitude" in own:
        yield (
            f"the file has DoRA's magnitudes for {both}, which are over other axes in each, and "
            f"'{named.path}' is both (tied={named.rule.tied!r}); {_OF_ITS_OWN}."
        )
    elif not _are_alike(config, tensors, named, own, other):
        yield (
            f"the file changes {both} each in its own way, and '{named.path}' is both "
            f"(tied={named.rule.tied!r}); {_OF_ITS_OWN}."
        )


def untellable_tied(named: NamedLeaf) -> str | None:
    """Returns why a leaf that is two parameters can't be written, or None."""
    leaf = named.leaf
    if not named.rule.tied or not is_adapter_node(leaf) or selects_rows(leaf):
        return None
    if named.tied_name is None:
        return (
            f"`wrapped` adapts '{named.path}', which is '{named.name(())}' and another parameter "
            "(tied=True), and PEFT would change only the first; expected the name of the other, "
            f"for which the same is written{_naming(named)}."
        )
    if is_lora_weight(leaf) and leaf.magnitude is not None:
        return (
            f"`wrapped` has magnitudes (DoRA) at '{named.path}', which is '{named.name(())}' and "
            f"'{named.tied_name}': PEFT has other norms for the two. wrap(..., dora=False) there."
        )
    return None


def adapts_tied(tree: NamedTree) -> bool:
    """Says whether a leaf that is two parameters is adapted or trained, but for single rows."""
    return any(
        named.rule.tied and is_adapter_node(named.leaf) and not selects_rows(named.leaf)
        for named in tree.leaves
    )


def _quoted(name: str | None) -> str:
    return "another parameter" if name is None else f"'{name}'"


def _naming(named: NamedLeaf) -> str:
    rule = named.rule
    return f": Rule({rule.name!r}, {rule.path!r}, ..., tied='lm_head.weight') names the other"


def _are_alike(
    config: Mapping[str, Any],
    tensors: Tensors,
    named: NamedLeaf,
    own: Mapping[str, str],
    other: Mapping[str, str],
) -> bool:
    if "weight" in own:
        return np.array_equal(tensors[own["weight"]], tensors[other["weight"]])
    pairs = (("lora_A", "lora_B"), ("lora_B", "lora_A"))
    scales = {_scale(config, name) for name in (named.name(()), str(named.tied_name))}
    return len(scales) == 1 and all(
        np.array_equal(tensors[own[part]], tensors[other[opposite]].T) for part, opposite in pairs
    )


def _scale(config: Mapping[str, Any], name: str) -> float:
    module = name.removesuffix(".weight")
    return scale_of(config, module, rank_of(config, module))
