"""Reading an adapter that PEFT, or `save`, wrote, and a dry run that shows what fits."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lora_jax._dtypes import common_dtype
from lora_jax._folders import CheckpointError
from lora_jax._nodes import check_plain
from lora_jax._originals import lora_weight
from lora_jax._paths import map_with_paths
from lora_jax._settings import checked_freeze
from lora_jax._shapes import Axes
from lora_jax._tables import table
from lora_jax._weight import FullWeight, LoRAWeight
from lora_jax.exchange.peft._files import Tensors, read_adapter
from lora_jax.exchange.peft._names import GivenAxes, NamedLeaf, NamedTree, named_tree
from lora_jax.exchange.peft._plan import Keys, PlannedLeaf, adapter_layout, planned, planned_scale
from lora_jax.exchange.peft._rules import Rule
from lora_jax.exchange.peft._tied import untellable_tied
from lora_jax.exchange.peft._token_rows import row_weight_of_file

_HEADER = ("PyTorch name", "shape", "path", "shape", "axes", "in the file")


def load(
    path: str | os.PathLike[str],
    params: PyTree,
    *,
    names: Sequence[Rule],
    axes: GivenAxes = None,
    freeze: str | Sequence[str] = (),
    peft_version: str | None = None,
) -> PyTree:
    r"""Returns `params` wrapped with an adapter in the file format of Hugging Face PEFT.

    The model then computes with $W + \frac{\alpha}{r} B A$ (under rsLoRA $\frac{\alpha}{\sqrt r}$)
    as PEFT does, with the file's own numbers. Weights that were trained in full (`modules_to_save`,
    `bias`) become `FullWeight` nodes, and weights of which single rows were trained
    (`trainable_token_indices`) become nodes of these rows. Only data is read, never a pickle or a
    class that a config names.

    Args:
      path: the folder with `adapter_config.json` and `adapter_model.safetensors`.
      params: plain params of the model that the adapter belongs to.
      names: the rules for the model's parameters; the first whose path a leaf has counts.
      axes: where the rules don't say it, each axis's role, as in `wrap`: a mapping from path or
        expression, or what `infer_axes` returned.
      freeze: which of `"lora_A"`, `"lora_B"` and `"magnitude"` do not train any further. The format
        does not say what was frozen.
      peft_version: the version of PEFT that wrote the file, in place of the one in its config. It
        only says how `target_parameters` with square matrices are laid out.

    Returns:
      A wrapped tree, on JAX's default device. A stack of which the file adapts some layers has
      these as its `layers`; one of which it trains some layers in full trains the others too.

    Raises:
      CheckpointError: there is no adapter, it is damaged or holds values that are not finite, it
        asks for what lora_jax does not support, or a tensor has no place or another shape.
        `preview` shows everything that does not fit.
      ValueError: `names` contradict each other or the tree.
      ImportError: safetensors is not installed.

    Source: Hugging Face PEFT, developer guide "PEFT checkpoint format".

    Examples:
      >>> import jax.numpy as jnp, lora_jax, tempfile
      >>> from lora_jax.exchange import peft
      >>> names = [peft.Rule("layer.{i}.query.weight", "layer_{i}/query/kernel")]
      >>> params = {"layer_0": {"query": {"kernel": jnp.ones((4, 3))}}}
      >>> wrapped = lora_jax.wrap(params, "query", rank=2)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     peft.save(folder, wrapped, names=names)
      ...     loaded = peft.load(folder, params, names=names)
      >>> bool((loaded["layer_0"]["query"]["kernel"].lora_A
      ...       == wrapped["layer_0"]["query"]["kernel"].lora_A).all())
      True
    """
    source = Path(path)
    frozen = checked_freeze("`freeze`", freeze)
    check_plain(params, "expected plain params: load(path, unwrap(params), ...).")
    config, tensors = read_adapter(source, peft_version)
    return with_adapter(f"the adapter {source}", config, tensors, params, names, axes, frozen)


def with_adapter(
    subject: str,
    config: Mapping[str, Any],
    tensors: Tensors,
    params: PyTree,
    names: Sequence[Rule],
    axes: GivenAxes,
    frozen: tuple[str, ...],
) -> PyTree:
    """Returns `params` wrapped with an adapter that has been read.

    Args:
      subject: what was read, for errors.
      config: its config.
      tensors: its tensors, by PEFT's keys.
      params: as for `load`, and so the next two.
      names: see there.
      axes: see there.
      frozen: the names of the parts that do not train any further.

    Raises:
      CheckpointError: something does not fit, or there is nothing.
    """
    plan = planned(config, tensors, named_tree(params, names, axes))
    if plan.problems:
        raise CheckpointError(f"{subject} does not fit: {_summarised(plan.problems)}")
    if not plan.leaves:
        raise CheckpointError(f"{subject} holds no tensors; expected some.")

    def node(path: str, leaf: Any) -> Any:
        if path not in plan.leaves:
            return leaf
        found = plan.leaves[path]
        if "rows" in found.adapted.get((), {}):
            key = found.adapted[()]["rows"]
            return row_weight_of_file(config, tensors, found.named, key, frozen)
        if found.adapted:
            return _lora_weight(config, tensors, found, frozen)
        return _full_weight(tensors, found)

    return map_with_paths(node, params)


@dataclasses.dataclass(frozen=True)
class Preview:
    """What `load` and `save` make of some rules; `print` shows it as a table.

    Attributes:
      rows: for each leaf with a rule (only those in the file, if one is given): the name of its
        PyTorch parameters (both names, where it is two), the shape of each, the leaf's path, shape
        and axes, and what the file has of it.
      problems: what keeps `load` from reading the file, including tensors without a place; without
        a file, what keeps `save` from writing one.
      without_rule: the paths of leaves that no rule has.
      idle_rules: the rules that no leaf has.
      axes: by path, the role of each axis of the leaves with a rule, as `wrap` takes them.
    """

    rows: tuple[tuple[str, ...], ...]
    problems: tuple[str, ...]
    without_rule: tuple[str, ...]
    idle_rules: tuple[Rule, ...]
    axes: Mapping[str, Axes]

    def __str__(self) -> str:
        sections = {
            "What does not fit": self.problems,
            "Leaves without a rule": self.without_rule,
            "Rules without a leaf": tuple(
                f"{rule.name} -> {rule.path}" for rule in self.idle_rules
            ),
        }
        left_over = [
            "\n".join((f"{title}:", *(f"- {line}" for line in lines)))
            for title, lines in sections.items()
            if lines
        ]
        return "\n\n".join((table(_HEADER, self.rows), *left_over))


def preview(
    params: PyTree,
    *,
    names: Sequence[Rule],
    path: str | os.PathLike[str] | None = None,
    axes: GivenAxes = None,
    peft_version: str | None = None,
) -> Preview:
    """Returns which parameter each rule maps to which leaf, without loading or writing anything.

    Args:
      params: plain params, or a wrapped tree.
      names: the rules for the model's parameters; the first whose path a leaf has counts.
      path: the folder of an adapter to compare with; without it, only the tree and the rules are
        compared.
      axes: where the rules don't say it, each axis's role, as in `load`.
      peft_version: the version of PEFT that wrote the file, as in `load`.

    Returns:
      The mapping and what is left over on either side; print it.

    Raises:
      CheckpointError: there is no adapter, it is damaged, or asks for what is not supported.
      ValueError: `names` contradict each other or the tree.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lora_jax.exchange import peft
      >>> params = {"layers": {"query": jnp.ones((12, 8, 2, 4))}, "scale": jnp.ones(8)}
      >>> axes = ("batch", "in", "out", "out")
      >>> names = [peft.Rule("layers.{n}.query.weight", "layers/query", axes=axes)]
      >>> print(peft.preview(params, names=names))
      PyTorch name             shape   path          shape          axes                 in the file
      -----------------------  ------  ------------  -------------  -------------------  -----------
      layers.{n}.query.weight  (8, 8)  layers/query  (12, 8, 2, 4)  batch, in, out, out
      <BLANKLINE>
      Leaves without a rule:
      - scale
    """
    tree = named_tree(params, names, axes)
    roles = {leaf.path: leaf.axes for leaf in tree.leaves if leaf.axes is not None}
    if path is None:
        rows = tuple(_row(leaf, "") for leaf in tree.leaves)
        problems = (leaf.problem() or untellable_tied(leaf) for leaf in tree.leaves)
        found = tuple(problem for problem in problems if problem)
        return Preview(rows, found, tree.without_rule, tree.idle_rules, roles)
    return preview_of(*read_adapter(Path(path), peft_version), tree)


def preview_of(config: Mapping[str, Any], tensors: Tensors, tree: NamedTree) -> Preview:
    """Returns what `with_adapter` makes of an adapter that has been read."""
    plan = planned(config, tensors, tree)
    roles = {leaf.path: leaf.axes for leaf in tree.leaves if leaf.axes is not None}
    rows = tuple(_row(leaf.named, _held(leaf, tensors)) for leaf in plan.leaves.values())
    return Preview(rows, plan.problems, tree.without_rule, tree.idle_rules, roles)


def _summarised(problems: Sequence[str], limit: int = 5) -> str:
    """Returns problems as a text, cut at `limit`."""
    if len(problems) == 1:
        return problems[0]
    more = f"\n- and {len(problems) - limit} more" if len(problems) > limit else ""
    return "".join(f"\n- {problem}" for problem in problems[:limit]) + more


def _lora_weight(
    config: Mapping[str, Any], tensors: Tensors, found: PlannedLeaf, frozen: tuple[str, ...]
) -> LoRAWeight:
    named, places = found.named, sorted(found.adapted)
    parts = [_tree_parts(config, tensors, named, found.adapted[place]) for place in places]
    firsts = sorted({place[0] for place in places if place})
    count = named.leaf.shape[named.stack[0]] if named.stack else 0
    stack = [len(firsts), *(named.leaf.shape[axis] for axis in named.stack[1:])] if firsts else []
    arrays = {name: _stacked([part[name] for part in parts], stack) for name in parts[0]}
    first = places[0]
    scale = planned_scale(config, tensors, named, first, found.adapted[first])
    axes = named.axes
    assert axes is not None
    return lora_weight(
        named.leaf,
        **arrays,
        scale=jnp.asarray(scale, common_dtype(arrays["lora_A"].dtype, jnp.float32)),
        axes=axes,
        layers=None if len(firsts) == count else tuple(firsts),
        frozen=tuple(name for name in frozen if name in arrays),
    )


def _tree_parts(
    config: Mapping[str, Any], tensors: Tensors, named: NamedLeaf, keys: Keys
) -> dict[str, np.ndarray]:
    layout = adapter_layout(config, tensors, named, keys)
    assert layout is not None
    lora_A, lora_B = layout.tree_factors(tensors[keys["lora_A"]], tensors[keys["lora_B"]])
    parts = {"lora_A": lora_A, "lora_B": lora_B}
    if "magnitude" in keys:
        parts["magnitude"] = layout.tree_magnitude(tensors[keys["magnitude"]])
    return parts


def _stacked(parts: Sequence[np.ndarray], stack: Sequence[int]) -> Any:
    # A copy: the file may change while the tree is in use.
    return jnp.array(np.stack(parts).reshape((*stack, *parts[0].shape)))


def _full_weight(tensors: Tensors, found: PlannedLeaf) -> FullWeight:
    named = found.named
    value = np.array(named.leaf)
    in_order = np.moveaxis(value, named.stack, range(len(named.stack)))
    for place, key in found.weights.items():
        in_order[place] = named.layout.tree_weight(tensors[key]).astype(value.dtype)
    return FullWeight(base=named.leaf, value=jnp.array(value))


def _row(named: NamedLeaf, held: str) -> tuple[str, ...]:
    shape = "?" if named.problem() else str(named.layout.weight_shape)
    tied = f" = {named.tied_name or 'another'}" if named.rule.tied else ""
    return (
        f"{named.template}{tied}",
        shape,
        named.path,
        str(tuple(named.leaf.shape)),
        "?" if named.axes is None else ", ".join(named.axes),
        held,
    )


def _held(leaf: PlannedLeaf, tensors: Tensors) -> str:
    places = {**leaf.adapted, **leaf.weights}
    shapes = dict.fromkeys(_shapes(leaf, tensors))
    times = f"{len(places)} × " if leaf.named.stack else ""
    return times + ", ".join(shapes)


def _shapes(leaf: PlannedLeaf, tensors: Tensors) -> Iterator[str]:
    for keys in leaf.adapted.values():
        yield from (f"{part} {tensors[key].shape}" for part, key in sorted(keys.items()))
    for key in leaf.weights.values():
        yield f"in full {tensors[key].shape}"
