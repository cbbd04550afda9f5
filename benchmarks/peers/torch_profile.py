"""Where the time of a step in PyTorch goes on a CPU."""

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.peers.xla_profile import ATTENTION, FACTORS, HEAD, KINDS, OTHERS, WAITING, WEIGHTS

_PRODUCTS = ("mm", "addmm")


@dataclass(frozen=True)
class Sizes:
    """What tells the operations of a model with PEFT's adapters apart: the sizes of their inputs.

    Attributes:
      frozen: the two sizes of each weight that has an adapter, the smaller first.
      rank: that of the adapters.
      vocabulary: how many tokens there are.
    """

    frozen: Collection[tuple[int, ...]]
    rank: int
    vocabulary: int

    @classmethod
    def of(cls, model: nn.Module, vocabulary: int) -> Self:
        """Returns those of a model whose adapters have one rank."""
        shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        frozen = {_ordered(each) for name, each in shapes.items() if "base_layer.weight" in name}
        (rank,) = {each[0] for name, each in shapes.items() if "lora_A" in name}
        return cls(frozen, rank, vocabulary)

    def kind_of(self, name: str, shapes: Sequence[Sequence[int]]) -> str:
        """Returns the kind of an operation.

        Args:
          name: its name in `torch.ops.aten`.
          shapes: those of the arrays that it takes.
        """
        if "attention" in name:
            return ATTENTION
        if any(self.vocabulary in shape for shape in shapes):
            return HEAD
        matrices = [_ordered(shape) for shape in shapes if len(shape) == 2]
        if any(self.rank in matrix for matrix in matrices):
            return FACTORS
        if name in _PRODUCTS and any(matrix in self.frozen for matrix in matrices):
            return WEIGHTS
        return OTHERS


class _Timed(TorchDispatchMode):
    """Adds up how long each kind of operation takes, forward and backward.

    PyTorch's own profiler keeps what operations take, if it is to tell the sizes; so much memory is
    new then that a step takes nearly twice as long.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.seconds = Counter(dict.fromkeys(KINDS, 0.0))
        self._sizes = sizes

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        start = time.perf_counter()
        found = operation(*arguments, **(options or {}))
        own = time.perf_counter() - start
        shapes = [each.shape for each in arguments if isinstance(each, torch.Tensor)]
        self.seconds[self._sizes.kind_of(operation.overloadpacket.__name__, shapes)] += own
        return found


def torch_seconds(take_steps: Callable[[], float], sizes: Sizes) -> dict[str, float]:
    """Returns how long steps took by the clock, divided into kinds of operations.

    Operations come one after the other, each on all threads.

    Args:
      take_steps: takes them, and returns their seconds.
      sizes: what tells the operations apart.
    """
    with _Timed(sizes) as timed:
        seconds = take_steps()
    return {**timed.seconds, WAITING: seconds - timed.seconds.total()}


def _ordered(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(shape))
