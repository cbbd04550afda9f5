"""The adapters of a wrapped tree, and its weights that train in full, as PEFT has them."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import PyTree

from lora_jax._folders import CheckpointError
from lora_jax._nodes import adapter_nodes, check_whole
from lora_jax._originals import on_original
from lora_jax._paths import listed
from lora_jax._processes import on_host
from lora_jax._row_selection import selects_rows
from lora_jax._shapes import factor_shapes, layers_shape
from lora_jax._weight import FullWeight, LoRAWeight, is_adapter_node, is_bank, is_lora_weight
from lora_jax.exchange.peft._files import Tensors
from lora_jax.exchange.peft._layout import written_layout
from lora_jax.exchange.peft._names import (
    PREFIX,
    NamedLeaf,
    NamedTree,
    Part,
    Place,
    adapter_key,
    bias_key,
    taken,
)
from lora_jax.exchange.peft._rules import Rule
from lora_jax.exchange.peft._tied import parts_of_other
from lora_jax.exchange.peft._token_rows import TokenRows

# What PEFT adds to `modules_to_save` by itself.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One adapter of a PyTorch module, or of a module's own parameter.

    Attributes:
      module: the module that PEFT wraps.
      target: by what name a config targets it: the module, or the parameter.
      rank: its rank.
      scale: its scale, in the dtype of the tree.
      parts: its tensors as PEFT has them.
      named: the leaf that it comes from.
      is_embedding: whether the module is an embedding.
    """

    module: str
    target: str
    rank: int
    scale: np.ndarray
    parts: Mapping[Part, np.ndarray]
    named: NamedLeaf
    is_embedding: bool

    @property
    def is_parameter(self) -> bool:
        """Whether it adapts a parameter as such, not a module's weight."""
        return self.named.rule.kind == "parameter"


@dataclasses.dataclass(frozen=True)
class Adapters:
    """All adapters of a tree.

    Attributes:
      each: the adapters; of the parameters of one module the innermost first.
      wrappers: for each adapted module, how many adapters PEFT puts around it.
    """

    each: tuple[Adapter, ...]
    wrappers: Mapping[str, int]

    @property
    def tensors(self) -> Tensors:
        """The tensors of all adapters, by their keys."""
        left = collections.Counter(self.wrappers)
        tensors = {}
        for adapter in self.each:
            left[adapter.module] -= 1
            for part, tensor in adapter.parts.items():
                key = adapter_key(
                    adapter.module,
                    part,
                    is_embedding=adapter.is_embedding,
                    depth=left[adapter.module],
                )
                tensors[key] = tensor
        return tensors

    @property
    def has_magnitudes(self) -> bool:
        """Whether these are DoRA's."""
        return any("magnitude" in adapter.parts for adapter in self.each)


@dataclasses.dataclass(frozen=True)
class TrainedWeights:
    """What trains in full, in PEFT's words.

    Attributes:
      tensors: the weights by their keys, with those that PEFT wants beside them.
      modules_to_save: the modules that train in full.
      bias: which biases train, `"none"`, `"lora_only"` (those of adapted modules) or `"all"`.
    """

    tensors: Tensors
    modules_to_save: tuple[str, ...]
    bias: str


def check_complete(wrapped: PyTree, names: Sequence[Rule]) -> None:
    """Raises unless `wrapped` has nodes, each whole and with a rule."""
    nodes = adapter_nodes(wrapped)
    for path, node in nodes.items():
        check_whole(path, node)
    banks = [path for path, node in nodes.items() if is_bank(node)]
    if banks:
        raise CheckpointError(
            f"`wrapped` holds several adapters at {listed(banks)}; expected one, as a file does: "
            "save(path, serving.select(bank, id), ...)."
        )
    nested = [path for path, node in nodes.items() if is_adapter_node(node.base)]
    if nested:
        raise CheckpointError(
            f"`wrapped` has an adapter on another one at {listed(nested)}; expected one for each "
            "weight, as a file has. arithmetic.extract(params, merge(wrapped), targets, "
            "rank=...) makes one of both."
        )
    nameless = [path for path in nodes if all(rule.fields_of(path) is None for rule in names)]
    if nameless:
        raise CheckpointError(
            f"`names` has no rule for {listed(nameless)}, which `wrapped` adapts or trains; "
            f"expected one, such as Rule('PYTORCH.NAME.weight', {nameless[0]!r})."
        )


def exported_adapters(tree: NamedTree) -> Adapters:
    """Returns the adapters of a tree."""
    each = tuple(
        adapter
        for named in tree.leaves
        if is_lora_weight(named.leaf) and not selects_rows(named.leaf)
        for adapter in _adapters_of(named, on_original(named.leaf))
    )
    if not each:
        raise CheckpointError(
            "`wrapped` has no low-rank adapters, which PEFT needs; expected what "
            "wrap(params, targets) returned."
        )
    adapters = Adapters(each, collections.Counter(adapter.module for adapter in each))
    _check_wrappers(adapters)
    _check_magnitudes(adapters)
    return adapters


def exported_weights(
    tree: NamedTree, adapters: Adapters, rows: TokenRows, config: Mapping[str, Any]
) -> TrainedWeights:
    """Returns the weights that train in full.

    PEFT trains a module as a whole, and expects all of its tensors: `modules_to_save`. Biases may
    train alone.
    """
    trained = [name for name in tree.by_name if _is_trained(tree, name)]
    given = tuple(config.get("modules_to_save") or ())
    heads = _HEADS.get(str(config.get("task_type")), ())
    whole = {_module(name): None for name in trained if not name.endswith(".bias")}
    entries = (*given, *(module for module in whole if not _matches(module, given)))
    saved = _saved_modules(tree, (*entries, *heads))
    _check_apart(adapters, rows, saved, entries)
    tensors = {
        f"{PREFIX}{name}": _value(tree, name) for name in tree.by_name if _is_inside(name, saved)
    }
    biases = [name for name in trained if not _is_inside(name, saved)]
    for name in biases:
        module = _module(name)
        key = bias_key(module, wrappers=adapters.wrappers.get(module, 0))
        tensors[key] = _value(tree, name)
    are_adapted = all(_module(name) in adapters.wrappers for name in biases)
    bias = "lora_only" if are_adapted and config.get("bias") != "all" else "all"
    return TrainedWeights(tensors, entries, bias if biases else "none")


def adapted_places(named: NamedLeaf, weight: LoRAWeight) -> Iterator[tuple[Place, Place]]:
    """Yields each adapted place of a leaf, and the place where the factors hold it."""
    for place in named.places:
        if weight.layers is None:
            yield place, place
        elif place[0] in weight.layers:
            yield place, (weight.layers.index(place[0]), *place[1:])


def check_shapes(named: NamedLeaf, weight: LoRAWeight) -> None:
    """Raises unless the factors are those of one adapter of the parameters of a leaf."""
    part = layers_shape(tuple(weight.shape), weight.axes, weight.layers)
    expected = factor_shapes(part, weight.axes, weight.rank)
    shapes = tuple(weight.lora_A.shape), tuple(weight.lora_B.shape)
    if shapes != expected or np.ndim(weight.scale) != 0:
        raise CheckpointError(
            f"`wrapped` has lora_A and lora_B of shapes {shapes} and a scale of shape "
            f"{np.shape(weight.scale)} at '{named.path}'; expected {expected} and a scalar. Of "
            "a bank, save one adapter at a time."
        )
    if weight.layers is not None and not named.stack:
        raise CheckpointError(
            f"`wrapped` adapts the places {weight.layers} of '{named.path}', which is one "
            f"parameter {named.rule.name!r} in PyTorch; a file adapts all experts of a parameter "
            "or none."
        )


def _adapters_of(named: NamedLeaf, weight: LoRAWeight) -> Iterator[Adapter]:
    check_shapes(named, weight)
    layout = written_layout(named.layout)
    lora_A, lora_B, scale = map(on_host, (weight.lora_A, weight.lora_B, weight.scale))
    magnitude = None if weight.magnitude is None else on_host(weight.magnitude)
    for place, held in adapted_places(named, weight):
        A, B = layout.file_factors(lora_A[held], lora_B[held])
        parts: dict[Part, np.ndarray] = {"lora_A": A, "lora_B": B}
        if magnitude is not None:
            shape = layout.file_shapes(weight.rank)["magnitude"]
            parts["magnitude"] = magnitude[held].reshape(shape)
        is_embedding = named.rule.kind == "embedding"
        names = [(named.name(place), parts, is_embedding)]
        if named.tied_name is not None:
            names.append((named.tied_name, parts_of_other(parts), not is_embedding))
        for name, own_parts, is_lookup in names:
            module, target = _module_and_target(named, name)
            yield Adapter(module, target, weight.rank, scale, own_parts, named, is_lookup)


def _module_and_target(named: NamedLeaf, name: str) -> tuple[str, str]:
    kind = named.rule.kind
    module, _, parameter = name.rpartition(".")
    if kind == "array":
        raise CheckpointError(
            f"`wrapped` adapts '{named.path}', whose rule {named.rule.name!r} has the kind "
            "'array'; PEFT adapts the kinds 'linear', 'embedding', 'conv' and 'parameter'."
        )
    if kind == "parameter":
        if not module:
            raise CheckpointError(
                f"`wrapped` adapts '{named.path}', whose PyTorch name '{name}' has no module; PEFT "
                "can't adapt a parameter of the whole model."
            )
        return module, name
    if parameter != "weight" or not module:
        raise CheckpointError(
            f"`wrapped` adapts '{named.path}', whose PyTorch name is '{name}'; PEFT adapts a "
            "module's weight, 'MODULE.weight', or with Rule(..., kind='parameter') a parameter of "
            "another name."
        )
    return module, module


def _check_wrappers(adapters: Adapters) -> None:
    for adapter in adapters.each:
        if adapters.wrappers[adapter.module] > 1 and not adapter.is_parameter:
            raise CheckpointError(
                f"`wrapped` adapts '{adapter.target}' twice, once at '{adapter.named.path}'; PEFT "
                "adapts either a module's weight or its other parameters."
            )
    rules: dict[tuple[str, Any], str] = {}
    for adapter in adapters.each:
        if not adapter.is_parameter:
            continue
        first = rules.setdefault((adapter.module, adapter.named.rule), adapter.target)
        if first != adapter.target:
            raise CheckpointError(
                f"'{first}' and '{adapter.target}' share the rule {adapter.named.rule.name!r}; "
                "expected a rule for each, in the order in which the PyTorch module defines them."
            )


def _check_magnitudes(adapters: Adapters) -> None:
    if not adapters.has_magnitudes:
        return
    for adapter in adapters.each:
        if "magnitude" not in adapter.parts:
            raise CheckpointError(
                f"`wrapped` has magnitudes (DoRA) in some weights and none at "
                f"'{adapter.named.path}'; PEFT has them for all adapters or for none."
            )
        if adapter.is_parameter:
            raise CheckpointError(
                f"`wrapped` has magnitudes (DoRA) at '{adapter.named.path}', of the kind "
                "'parameter'; PEFT has no DoRA for parameters. wrap(..., dora=False) there."
            )


def _is_trained(tree: NamedTree, name: str) -> bool:
    return isinstance(tree.by_name[name][0].leaf, FullWeight)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _matches(module: str, entries: Iterable[str]) -> bool:
    # As PEFT asks it: an entry may begin in the middle of a segment.
    return any(module.endswith(entry) for entry in entries)


def _saved_modules(tree: NamedTree, entries: Iterable[str]) -> tuple[str, ...]:
    """Returns the modules that PEFT takes these entries to mean, of those that the tree knows."""
    if "" in entries:
        loose = [name for name in tree.by_name if _is_trained(tree, name) and not _module(name)]
        raise CheckpointError(
            f"`wrapped` trains '{loose[0] if loose else ''}' in full, a parameter without a "
            "module; PEFT trains modules in full."
        )
    modules: dict[str, None] = {}
    for name in tree.by_name:
        parts = name.split(".")[:-1]
        modules |= {".".join(parts[: end + 1]): None for end in range(len(parts))}
    return tuple(module for module in modules if _matches(module, entries))


def _is_inside(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _check_apart(
    adapters: Adapters, rows: TokenRows, saved: tuple[str, ...], entries: tuple[str, ...]
) -> None:
    adapted = [(adapter.module, adapter.named.path) for adapter in adapters.each]
    for module, path in (*adapted, *rows.paths.items()):
        if _is_inside(f"{module}.", saved):
            raise CheckpointError(
                f"`wrapped` adapts '{path}', which is in a module that trains in "
                f"full: `modules_to_save` {list(entries)}. PEFT trains whole modules and adapts "
                "nothing in them; leave one of the two out of wrap(..., train=...)."
            )


def _value(tree: NamedTree, name: str) -> np.ndarray:
    named, place = tree.by_name[name]
    leaf = named.leaf
    assert not is_lora_weight(leaf)
    value = leaf.value if isinstance(leaf, FullWeight) else leaf
    return named.layout.file_weight(taken(value, named, place))
