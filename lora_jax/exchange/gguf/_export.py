r"""The adapters of a wrapped tree as llama.cpp has them.

llama.cpp keeps a weight as W (out, in), and has for it `lora_a`, A (r, in), and `lora_b`,
B (out, r), with which it computes

    y = W x + s · t · B (A x),    s = alpha / r where alpha is not 0, else 1,

where r is B's own and t the user's scale. One alpha holds for the whole file. Three kinds of
tensors differ:

- `token_embd.weight` is a lookup: row n of A (vocabulary, r) is multiplied by B (dim, r). Where the
  output layer has no weight of its own, llama.cpp takes the same pair for a product there, whose
  shapes do not fit, and stops the process.
- Experts are stacked: A (experts, r, in) and B (experts, out, r).
- Llama's queries and keys have their rows in another order. Their rotary embedding turns pairs of
  neighbours, and that of most models the two halves of a head, so that the converter interleaves
  the halves of each head: row (h, half, n) is row (h, n, half) in the file. B's rows follow.

Source: llama.cpp, src/llama-adapter.cpp; `build_lora_mm`, `build_lora_mm_id` and `build_inp_embd`
of src/llama-graph.cpp; `LlamaModel.permute` of conversion/llama.py; convert_lora_to_gguf.py.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from lora_jax._folders import CheckpointError
from lora_jax._originals import on_original
from lora_jax._paths import listed, nearest_paths
from lora_jax._processes import on_host
from lora_jax._row_selection import selects_rows
from lora_jax._shapes import sizes
from lora_jax._weight import FullWeight, LoRAWeight, is_lora_weight
from lora_jax.exchange.peft._export import adapted_places, check_shapes
from lora_jax.exchange.peft._files import check_finite
from lora_jax.exchange.peft._names import NamedLeaf, NamedTree, Part
from lora_jax.exchange.peft._tied import parts_of_other

_LOOKUP, _HEAD = "token_embd.weight", "output.weight"
_ROTATED = re.compile(r"blk\.\d+\.attn_[qk]\.weight")
_EXPERTS = re.compile(r".*_exps\.weight")

# Whether llama.cpp's converter interleaves the rows of queries and keys.
_PERMUTES: Mapping[str, bool] = MappingProxyType(
    {
        "llama": True,
        **dict.fromkeys(("gemma", "gemma2", "gemma3"), False),
        **dict.fromkeys(("qwen2", "qwen2moe", "qwen3", "qwen3moe"), False),
    }
)
_NO_TIED = (
    "llama.cpp has no adapter of an embedding that is the output layer too. Leave it out of the "
    "targets, or write merge(wrapped) as a model. If the model's file holds both weights, a rule "
    "says so: for a leaf that is both, Rule('token_embd.weight', ..., kind='embedding', "
    "tied='output.weight'), and otherwise a rule for each."
)


@dataclasses.dataclass(frozen=True)
class _Adapter:
    r"""The adapter of one tensor.

    Attributes:
      name: the tensor's name.
      A: of shape (\*experts, r, in).
      B: of shape (\*experts, out, r).
      scale: the scale.
      named: the leaf that it comes from.
    """

    name: str
    A: np.ndarray
    B: np.ndarray
    scale: float
    named: NamedLeaf

    @property
    def rank(self) -> int:
        return int(self.B.shape[-1])


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The model of a file, as `save` is told.

    Attributes:
      name: its `general.architecture`.
      permuted: whether queries and keys have other rows than the tree; None where its name says it.
      head_dim: the rows of a head; None where the leaves say it.
    """

    name: str
    permuted: bool | None
    head_dim: int | None


@dataclasses.dataclass(frozen=True)
class FileAdapter:
    """What a file holds.

    Attributes:
      alpha: its alpha; 0 where the scales are inside of lora_b.
      tensors: its tensors by their names.
    """

    alpha: float
    tensors: Mapping[str, np.ndarray]


def exported(gguf: Any, tree: NamedTree, architecture: Architecture) -> FileAdapter:
    """Returns what a file holds of the adapters of a tree.

    Raises:
      CheckpointError: a node can't be said in the format, or a value is not finite.
      ValueError: `architecture` is not one, or does not say what is needed.
    """
    _check_sayable(tree)
    in_tree = tuple(_adapters(tree))
    _check_names(gguf, architecture.name, in_tree)
    _check_head(tree, in_tree)
    adapters = tuple(_in_file_order(adapter, architecture) for adapter in in_tree)
    alpha = _common_alpha(adapters)
    tensors = dict(_tensors(adapters, has_alpha=alpha is not None))
    for key, tensor in tensors.items():
        check_finite("`wrapped`", key, tensor)
    return FileAdapter(alpha or 0.0, tensors)


def _check_sayable(tree: NamedTree) -> None:
    """Raises unless the format has a form for every node of a tree."""
    full = [it.path for it in tree.leaves if isinstance(it.leaf, FullWeight)]
    if full:
        raise CheckpointError(
            f"`wrapped` trains {listed(full)} in full, and a LoRA file of GGUF holds low-rank "
            "adapters only; wrap(..., train=...) without them, or write merge(wrapped) as a model."
        )
    for named in tree.leaves:
        if not is_lora_weight(named.leaf):
            continue
        if selects_rows(named.leaf):
            raise CheckpointError(
                f"`wrapped` adapts single rows of '{named.path}', and a LoRA file of GGUF holds "
                "low-rank adapters only; merge(wrapped, targets=...) puts the rows into the model."
            )
        if named.leaf.magnitude is not None:
            raise CheckpointError(
                f"`wrapped` has magnitudes (DoRA) at '{named.path}', which llama.cpp does not "
                "know; wrap(..., dora=False), or write merge(wrapped) as a model."
            )
        if named.rule.kind not in {"linear", "embedding", "parameter"} or named.rule.transposed:
            how = "is transposed" if named.rule.transposed else f"has the kind {named.rule.kind!r}"
            raise CheckpointError(
                f"`wrapped` adapts '{named.path}', whose rule {named.rule.name!r} {how}; llama.cpp "
                "adapts matrices that a file has as (out, in): those of the kind 'linear', "
                "'embedding' for token_embd.weight, and 'parameter' for experts."
            )
        if named.rule.tied is True:
            raise CheckpointError(
                f"`wrapped` adapts '{named.path}', which is '{named.name(())}' and another "
                f"parameter (tied=True). {_NO_TIED}"
            )


def _adapters(tree: NamedTree) -> Iterator[_Adapter]:
    """Yields the adapter of each tensor, with its rows in the tree's order."""
    for named in tree.leaves:
        if is_lora_weight(named.leaf):
            check_shapes(named, named.leaf)
            yield from _adapters_of(named, on_original(named.leaf))


def _adapters_of(named: NamedLeaf, weight: LoRAWeight) -> Iterator[_Adapter]:
    layout = named.layout
    experts = sizes(layout.shape, layout.axes, "batch")
    lora_A, lora_B, scale = map(on_host, (weight.lora_A, weight.lora_B, weight.scale))
    if not np.isfinite(scale):
        raise CheckpointError(
            f"`wrapped` has the scale {float(scale)} at '{named.path}'; expected a finite number."
        )
    for place, held in adapted_places(named, weight):
        inner = lora_A[held].reshape(*experts, layout.inputs, weight.rank)
        outer = lora_B[held].reshape(*experts, weight.rank, layout.outputs)
        parts: dict[Part, np.ndarray] = {
            "lora_A": inner.swapaxes(-1, -2),
            "lora_B": outer.swapaxes(-1, -2),
        }
        each = [(named.name(place), parts)]
        if named.tied_name is not None:
            each.append((named.tied_name, parts_of_other(parts)))
        for name, own in each:
            yield _Adapter(name, own["lora_A"], own["lora_B"], float(scale), named)


def _check_names(gguf: Any, architecture: str, adapters: Sequence[_Adapter]) -> None:
    """Raises unless an architecture has a tensor of each name, of the adapter's form."""
    known = _tensor_names(gguf, architecture)
    for adapter in adapters:
        name, path = adapter.name, adapter.named.path
        general = re.sub(r"^blk\.\d+\.", "blk.{n}.", name)
        if general not in known:
            raise CheckpointError(
                f"`names` gives '{path}' the name '{name}', and no tensor of the architecture "
                f"{architecture!r} has that name in GGUF; the nearest are "
                f"{listed(nearest_paths(general, known))}."
            )
        is_lookup, is_adapted_as_lookup = name == _LOOKUP, _is_lookup(adapter)
        if is_lookup != is_adapted_as_lookup:
            kind = "embedding" if is_lookup else "linear"
            raise CheckpointError(
                f"`names` gives '{name}', which '{path}' is, the kind {adapter.named.rule.kind!r}; "
                f"expected Rule({adapter.named.rule.name!r}, ..., kind={kind!r})."
            )
        is_stack = adapter.A.ndim == 3
        if is_stack != (_EXPERTS.fullmatch(name) is not None):
            found, expected = "one matrix", "a stack of experts"
            if is_stack:
                found, expected = "a stack of matrices", "one matrix"
            raise CheckpointError(
                f"`names` gives '{path}' with the axes {adapter.named.axes}, {found}, the name "
                f"'{name}', which is {expected} in GGUF."
            )


def _tensor_names(gguf: Any, architecture: str) -> list[str]:
    """Returns the names of the matrices of an architecture, with {n} for the layer."""
    architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in architectures:
        near = nearest_paths(str(architecture), architectures) or ["llama"]
        raise ValueError(
            f"`architecture` is {architecture!r}; expected `general.architecture` of the model's "
            f"GGUF file, of those that this version of gguf knows, such as {listed(near)}. "
            "Mistral and SmolLM2 are 'llama'."
        )
    kinds = gguf.MODEL_TENSORS[architectures[architecture]]
    return [f"{gguf.TENSOR_NAMES[kind]}.weight".replace("{bid}", "{n}") for kind in kinds]


def _is_lookup(adapter: _Adapter) -> bool:
    """Says whether the rule takes a tensor for an embedding, or the other of two for one."""
    is_other = adapter.name == adapter.named.tied_name
    return (adapter.named.rule.kind == "embedding") != is_other


def _check_head(tree: NamedTree, adapters: Sequence[_Adapter]) -> None:
    """Raises if llama.cpp would multiply by an adapted lookup."""
    for adapter in adapters:
        if adapter.name == _LOOKUP and _HEAD not in tree.by_name:
            raise CheckpointError(
                f"`wrapped` adapts '{adapter.named.path}', which is '{_LOOKUP}', and `names` gives "
                f"no leaf the name '{_HEAD}', without which '{_LOOKUP}' is the output layer too. "
                f"{_NO_TIED}"
            )


def _in_file_order(adapter: _Adapter, architecture: Architecture) -> _Adapter:
    """Returns an adapter with its rows in the order that they have in the model's file."""
    if not _ROTATED.fullmatch(adapter.name) or not _permutes(architecture):
        return adapter
    outputs, rank = adapter.B.shape
    dim = _head_dim(adapter, architecture.head_dim)
    halves = adapter.B.reshape(outputs // dim, 2, dim // 2, rank)
    return dataclasses.replace(adapter, B=halves.swapaxes(1, 2).reshape(outputs, rank))


def _permutes(architecture: Architecture) -> bool:
    if architecture.permuted is not None:
        return architecture.permuted
    if architecture.name not in _PERMUTES:
        raise ValueError(
            f"`permuted` is None, and for the architecture {architecture.name!r} it is not known "
            "whether the model's file has the halves of each head of queries and keys interleaved; "
            "save(..., permuted=True) or False says so. llama.cpp's converter interleaves them "
            "where it calls `permute` in `modify_tensors`."
        )
    return _PERMUTES[architecture.name]


def _head_dim(adapter: _Adapter, given: int | None) -> int:
    """Returns the number of rows of a head of queries or keys."""
    named, outputs = adapter.named, adapter.B.shape[0]
    axes = named.axes or ()
    own = sizes(tuple(named.leaf.shape), axes, "out")
    subject = f"'{named.path}' of shape {tuple(named.leaf.shape)} with the axes {axes}"
    if given is None and len(own) < 2:
        raise ValueError(
            f"`head_dim` is None, and {subject} does not say how long a head is, within which "
            "llama.cpp has the rows interleaved; save(..., head_dim=64) says it, and "
            "save(..., permuted=False) that they are not."
        )
    dim = own[-1] if given is None else given
    if len(own) > 1 and dim != own[-1]:
        raise ValueError(
            f"`head_dim` is {dim}, and {subject} has heads of {own[-1]}, its last 'out' axis; "
            "leave out `head_dim`."
        )
    if dim < 2 or dim % 2 or outputs % dim:
        raise ValueError(
            f"`head_dim` is {dim} for {subject}; expected an even number that divides its "
            f"{outputs} outputs."
        )
    return dim


def _common_alpha(adapters: Sequence[_Adapter]) -> float | None:
    """Returns the shortest alpha with which llama.cpp computes every scale exactly, or None."""
    exact = adapters[0].scale * adapters[0].rank
    # With nine digits every number of float32 is another.
    for alpha in (float(f"{exact:.{digits}g}") for digits in range(1, 10)):
        if all(_has_scale(adapter, _float32(alpha)) for adapter in adapters):
            return alpha
    return None


def _has_scale(adapter: _Adapter, alpha: np.ndarray) -> bool:
    """Says whether llama.cpp computes the scale of an adapter with this alpha, which isn't 0."""
    return bool(alpha != 0 and alpha / np.float32(adapter.rank) == _float32(adapter.scale))


def _tensors(adapters: Sequence[_Adapter], *, has_alpha: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Yields each tensor of a file by its name."""
    for adapter in adapters:
        A, B = adapter.A, adapter.B
        if not has_alpha:
            B = B.astype(np.float64) * adapter.scale
        if adapter.name == _LOOKUP:
            A = A.T
        yield f"{adapter.name}.lora_a", _float32(A)
        yield f"{adapter.name}.lora_b", _float32(B)


def _float32(numbers: Any) -> np.ndarray:
    """Returns numbers in float32, in the order of their axes; too large ones are infinite."""
    with np.errstate(over="ignore"):
        return np.asarray(numbers, np.float32, order="C")
