"""A mesh of devices, and how weights and batches are cut over it.

Rows of a batch are cut over `data` and `fsdp`; weights over `fsdp` along the model's width, and
over `tensor` along heads, hidden features and the vocabulary. An axis that a mesh axis does not
divide is not cut.
"""

import argparse
import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments.common.errors import InputError
from experiments.llm.packing import Batch

AXES = ("data", "fsdp", "tensor")
# What rows are cut over.
_ROWS = ("data", "fsdp")

# How each kind of weight is cut, by the end of its path; layers are not cut.
_CUTS: Mapping[tuple[str, ...], tuple[str | None, ...]] = {
    ("embed", "embedding"): ("tensor", "fsdp"),
    ("head", "kernel"): ("fsdp", "tensor"),
    ("query", "kernel"): (None, "fsdp", "tensor", None),
    ("key", "kernel"): (None, "fsdp", "tensor", None),
    ("value", "kernel"): (None, "fsdp", "tensor", None),
    ("out", "kernel"): (None, "tensor", None, "fsdp"),
    ("gate", "kernel"): (None, "fsdp", "tensor"),
    ("up", "kernel"): (None, "fsdp", "tensor"),
    ("hidden", "kernel"): (None, "fsdp", "tensor"),
    ("down", "kernel"): (None, "tensor", "fsdp"),
}


def mesh_sizes(text: str) -> dict[str, int]:
    """Returns the axes in text such as `data=2,tensor=4`; a type of options."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in AXES or not size.isdecimal() or int(size) < 1 or name in sizes:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a mesh such as data=2,tensor=4, of the axes {', '.join(AXES)}"
            )
        sizes[name] = int(size)
    return sizes


@dataclass(frozen=True)
class Devices:
    """The devices that a training is on: one, or a mesh of them.

    Attributes:
      mesh: the mesh, if there is one.
    """

    mesh: jax.sharding.Mesh | None = None

    @classmethod
    def of(cls, sizes: Mapping[str, int] | None) -> "Devices":
        """Returns the devices of a mesh with these axes.

        Raises:
          InputError: there are more or fewer devices.
        """
        if sizes is None:
            return cls()
        count = math.prod(sizes.values())
        if count != jax.device_count():
            raise InputError(
                f"--mesh {','.join(f'{name}={size}' for name, size in sizes.items())} is for "
                f"{count} devices, and there are {jax.device_count()}"
            )
        types = (AxisType.Auto,) * len(AXES)
        shape = tuple(sizes.get(name, 1) for name in AXES)
        return cls(jax.make_mesh(shape, AXES, axis_types=types))

    @property
    def groups(self) -> int:
        """Into how many groups the rows of a batch are cut."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in _ROWS)

    @property
    def hidden_cut(self) -> PartitionSpec | None:
        """How hidden states (rows, length, width) are cut: along rows, and tokens over `tensor`.

        Without it the compiler may follow the weights, cut the width over `fsdp` and compute all
        rows on every device.
        """
        return None if self.mesh is None else PartitionSpec(_ROWS, "tensor")

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Makes the mesh that of the programs that are traced inside."""
        with jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext():
            yield

    def check_rows(self, rows: int) -> None:
        """Raises an `InputError` unless rows can be cut over the mesh."""
        if rows % self.groups:
            raise InputError(
                f"--batch-size is {rows}, which data and fsdp of --mesh cut into {self.groups} "
                "parts; pass a multiple of that"
            )

    def placed_shapes(self, shapes: Any) -> Any:
        """Returns the shapes of parameters with how each is cut."""
        if self.mesh is None:
            return shapes
        return jax.tree_util.tree_map_with_path(self._placed, shapes)

    def placed_batch(self, batch: Batch) -> Batch:
        """Returns a batch, or several that are stacked, with its rows and groups cut."""
        if self.mesh is None:
            return batch
        return jax.device_put(batch, self.batch_sharding(batch))

    def batch_sharding(self, batch: Batch) -> NamedSharding:
        """Returns how each array of a batch, or of several that are stacked, is cut on the mesh."""
        assert self.mesh is not None
        stacked = (None,) * (batch.tokens.ndim - 2)
        return NamedSharding(self.mesh, PartitionSpec(*stacked, _ROWS))

    def _placed(self, path: Any, shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        assert self.mesh is not None
        names = tuple(key.key for key in path)
        wanted = _CUTS.get(names[-2:], (None,) * len(shape.shape))
        spec = [
            axis if axis is not None and size % self.mesh.shape[axis] == 0 else None
            for axis, size in zip(wanted, shape.shape, strict=True)
        ]
        sharding = NamedSharding(self.mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
