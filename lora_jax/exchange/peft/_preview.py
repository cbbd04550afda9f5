"""A dry run: which PyTorch parameter is which leaf, and what is left over on either side."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxtyping import PyTree

from lora_jax._tables import table
from lora_jax.exchange.peft._held import PlannedLeaf
from lora_jax.exchange.peft._places import GivenAxes, NamedLeaf, named_tree
from lora_jax.exchange.peft._plan import planned
from lora_jax.exchange.peft._rules import Rule
from lora_jax.exchange.peft._tensors import Tensors, read_adapter
from lora_jax.exchange.peft._tied import untellable_tied

_HEADER = ("PyTorch name", "shape", "path", "shape", "axes", "in the file")


@dataclasses.dataclass(frozen=True)
class Preview:
    """What `load` and `save` make of some rules; printed, it is a table.

    Attributes:
      rows: for each leaf with a rule (of those in the file, where there is one): the name of its
        PyTorch parameters (both names, where it is two), the shape of each, the leaf's path, shape
        and axes, and what the file has of it.
      problems: what keeps `load` from reading the file, tensors without a place among it; without
        a file, what keeps `save` from writing one.
      without_rule: the paths of leaves that no rule has.
      idle_rules: the rules that no leaf has.
    """

    rows: tuple[tuple[str, ...], ...]
    problems: tuple[str, ...]
    without_rule: tuple[str, ...]
    idle_rules: tuple[Rule, ...]

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
    """Returns what some rules map to what, without loading or writing anything.

    Args:
      params: plain params, or a wrapped tree.
      names: the rules for the model's parameters; the first whose path a leaf has counts.
      path: the folder of an adapter to compare with; without, only the tree and the rules are.
      axes: where the rules don't say it, each axis's role, as in `load`.
      peft_version: the version of PEFT that wrote the file, as in `load`.

    Returns:
      The mapping and what is left over on either side; print it.

    Raises:
      CheckpointError: there is no adapter, it is damaged, or asks for what is not carried.
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
    if path is None:
        rows = tuple(_row(leaf, "") for leaf in tree.leaves)
        problems = (leaf.problem() or untellable_tied(leaf) for leaf in tree.leaves)
        found = tuple(problem for problem in problems if problem)
        return Preview(rows, found, tree.without_rule, tree.idle_rules)
    source = Path(path)
    config, tensors = read_adapter(source, peft_version)
    plan = planned(config, tensors, tree)
    rows = tuple(_row(leaf.named, _held(leaf, tensors)) for leaf in plan.leaves.values())
    return Preview(rows, plan.problems, tree.without_rule, tree.idle_rules)


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
