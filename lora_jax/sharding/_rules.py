"""Rules of one's own: which expression on paths gives an array which partition."""

import dataclasses
import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax._partition import names_of
from lora_jax._paths import compile_expression, listed, nearest_paths

Rules = Mapping[str, PartitionSpec]


@dataclasses.dataclass(frozen=True)
class CheckedRules:
    """The rules of a call, the first of which that matches counts.

    Attributes:
      rules: each expression with its partition.
      mesh: the mesh whose axes the partitions name.
    """

    rules: tuple[tuple[re.Pattern[str], PartitionSpec], ...]
    mesh: Mesh

    @classmethod
    def of(cls, rules: Rules, mesh: Mesh, paths: Sequence[str]) -> "CheckedRules":
        """Returns the rules for the leaves of these paths.

        Raises:
          ValueError: an expression matches no path, or a partition names an axis that the mesh does
            not have.
        """
        found = []
        for expression, spec in rules.items():
            pattern = compile_expression(expression, "rules")
            if not any(map(pattern.search, paths)):
                raise ValueError(
                    f"`rules`: the expression {expression!r} matches no leaf; the nearest paths "
                    f"are {listed(nearest_paths(expression, paths))}."
                )
            unknown = [
                name for cut in spec for name in names_of(cut) if name not in mesh.axis_names
            ]
            if unknown:
                raise ValueError(
                    f"`rules` gives {expression!r} the partition {spec}, and the mesh has no axis "
                    f"{unknown[0]!r}; expected some of {listed(mesh.axis_names)}."
                )
            found.append((pattern, spec))
        return cls(tuple(found), mesh)

    def sharding_of(self, path: str, leaf: Any, *, within: str = "") -> NamedSharding | None:
        """Returns the sharding that a rule gives a leaf, or None.

        Args:
          path: its path.
          leaf: the leaf, for its shape.
          within: the path of the node that holds it; a rule that matches that is the node's.

        Raises:
          ValueError: the partition has more axes than the leaf, or does not divide one of them.
        """
        for pattern, spec in self.rules:
            if pattern.search(path) and not (within and pattern.search(within)):
                return self._checked(path, leaf.shape, spec)
        return None

    def _checked(self, path: str, shape: tuple[int, ...], spec: PartitionSpec) -> NamedSharding:
        counts = [math.prod(self.mesh.shape[name] for name in names_of(cut)) for cut in spec]
        if len(spec) > len(shape) or any(map(operator.mod, shape, counts)):
            raise ValueError(
                f"`rules` gives '{path}' of shape {shape} the partition {spec}; expected one that "
                f"cuts at most {len(shape)} axes, each into equal parts, on a mesh of "
                f"{dict(self.mesh.shape)}."
            )
        return NamedSharding(self.mesh, spec)
