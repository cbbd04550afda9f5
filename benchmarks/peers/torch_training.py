"""A training of PEFT's in PyTorch, with the optimiser that the studies have."""

import abc
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import peft
import torch
import transformers
from torch import nn

from benchmarks.peers.steps import timed_steps
from experiments.common.memory import keep_freed_memory


def prepare_process() -> None:
    """Makes a process of PyTorch as quiet, and as frugal, as one of the other side."""
    keep_freed_memory()  # as on the other side, so that neither side has an advantage
    # PEFT uses names that transformers has new ones for.
    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def versions() -> dict[str, str]:
    """Returns what computes."""
    packages = {"torch": torch, "transformers": transformers, "peft": peft}
    return {name: package.__version__ for name, package in packages.items()}


class OnTorch:
    """A side whose memory is that of PyTorch's device.

    Attributes:
      device: the kind of device that the other side computes on.
    """

    def __init__(self, platform: str) -> None:
        """Takes the name that JAX has for the kind.

        Raises:
          RuntimeError: PyTorch has no such device.
        """
        self.device = torch.device("cuda" if platform == "gpu" else platform)
        if platform == "gpu" and not torch.cuda.is_available():
            raise RuntimeError("JAX computes on a GPU, and this PyTorch knows none")

    def accelerator_peak(self, *, forgotten: bool) -> int | None:
        """Returns the most memory of the GPU so far, and may begin to count anew."""
        if self.device.type != "cuda":
            return None
        peak = torch.cuda.max_memory_allocated()
        if forgotten:
            torch.cuda.reset_peak_memory_stats()
        return peak

    def wait(self) -> None:
        """Waits until all is computed."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class TorchTraining(OnTorch, abc.ABC):
    """AdamW on what trains of a model, with clipping and given learning rates."""

    _model: nn.Module
    _trainable: Sequence[nn.Parameter]
    _batches: Sequence[Mapping[str, Any]]

    def __init__(self, start: Mapping[str, Any], platform: str = "cpu") -> None:
        """Takes the settings that both sides start from, and where the other side computes."""
        super().__init__(platform)
        prepare_process()
        self._start = start

    @abc.abstractmethod
    def add_gradients(self, batch: Mapping[str, Any]) -> float:
        """Adds the gradients of a step's batch to what trains, and returns the loss."""

    def train(self, model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> None:
        """Takes the model, whose adapters train, and the batch of each step."""
        self._model, self._batches = model, batches
        self._trainable = [each for each in model.parameters() if each.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._trainable, lr=0.0, weight_decay=self._start["weight_decay"]
        )

    def try_batches(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Computes the gradients of these batches, and drops them."""
        self._model.train()
        for batch in batches:
            self.add_gradients(batch)
            self._optimizer.zero_grad(set_to_none=True)

    def steps(self, first: int, count: int) -> dict[str, Any]:
        """Takes these steps; returns their losses, and the seconds in all."""
        self._model.train()
        return timed_steps(self._step, first, count)

    def versions(self) -> dict[str, str]:
        """Returns what computes."""
        return versions()

    def _step(self, number: int) -> float:
        loss = self.add_gradients(self._batches[number])
        nn.utils.clip_grad_norm_(self._trainable, self._start["greatest_gradient"])
        for group in self._optimizer.param_groups:
            group["lr"] = self._start["learning_rates"][number]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.wait()
        return loss
