"""The MNIST study's training step in PyTorch: with PEFT, and with a parametrised weight."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.peers.batches import read_batches

_MEAN, _DEVIATION = 0.1307, 0.3081  # as in experiments.mnist.network
_LAYERS = ("hidden_1", "hidden_2", "output")


class Network(nn.Module):
    """The study's network, with the study's weights."""

    def __init__(self, weights: Path) -> None:
        """Reads `network.npz`, whose kernels are (in, out)."""
        super().__init__()
        with np.load(weights) as stored:
            for layer in _LAYERS:
                kernel, bias = (torch.tensor(stored[f"{layer}.{n}"]) for n in ("kernel", "bias"))
                linear = nn.Linear(*kernel.shape)
                linear.load_state_dict({"weight": kernel.T, "bias": bias})
                self.add_module(layer, linear)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits of images of bytes."""
        x = (images.float() / 255 - _MEAN) / _DEVIATION
        return self.output(torch.relu(self.hidden_2(torch.relu(self.hidden_1(x)))))


class LowRankSum(nn.Module):
    """W + scale·BA as a parametrisation: the sum is built whenever the weight is read."""

    def __init__(self, lora_A: Tensor, lora_B: Tensor, scale: float) -> None:
        """Takes the factors, which train."""
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
        self._scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the weight with the factors' product."""
        return weight + self._scale * (self.lora_B @ self.lora_A)


class _Contender:
    def __init__(self, model: nn.Module, folder: Path, learning_rate: float) -> None:
        self._model = model.train()
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.Adam(trainable, lr=learning_rate)
        self._batches = [
            (torch.from_numpy(batch["images"]), torch.from_numpy(batch["labels"]))
            for batch in read_batches(folder / "batches.npz")
        ]

    def steps(self, first: int, count: int) -> dict[str, Any]:
        """Takes a step on each of these batches; returns their losses, and the seconds in all."""
        start = time.perf_counter()
        batches = self._batches[first : first + count]
        losses = [self._step(*batch) for batch in batches]
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "losses": [float(loss) for loss in losses]}

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(self._model(images), labels)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def versions(self) -> dict[str, str]:
        """Returns what computes."""
        return {"torch": torch.__version__, "peft": peft.__version__}


class Peft(_Contender):
    """PEFT's own layers around the network's; compiled by PyTorch where that is asked for."""

    def __init__(self, folder: str, learning_rate: float, compiled: bool = False) -> None:
        """Reads what `benchmarks.peers.mnist_jax.write_start` wrote."""
        start = Path(folder)
        network = Network(start / "network.npz")
        model = peft.PeftModel.from_pretrained(network, start / "adapter", is_trainable=True)
        super().__init__(model, start, learning_rate)
        if compiled:
            self._model = torch.compile(model)


class Parametrized(_Contender):
    """The weights as parametrisations, the way most tutorials write LoRA."""

    def __init__(self, folder: str, learning_rate: float) -> None:
        """Reads what `benchmarks.peers.mnist_jax.write_start` wrote."""
        start = Path(folder)
        network = Network(start / "network.npz").requires_grad_(False)
        factors = load_file(start / "adapter" / "adapter_model.safetensors")
        config = peft.LoraConfig.from_pretrained(start / "adapter")
        for layer in _LAYERS:
            lora_A, lora_B = (
                factors[f"base_model.model.{layer}.{name}.weight"] for name in ("lora_A", "lora_B")
            )
            added = LowRankSum(lora_A, lora_B, config.lora_alpha / config.r)
            parametrize.register_parametrization(getattr(network, layer), "weight", added)
        super().__init__(network, start, learning_rate)
