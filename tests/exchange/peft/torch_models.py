"""The PyTorch twins of `models`."""

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_jax.exchange.peft._names import named_tree, taken
from tests.exchange.peft.models import CLASSES, EXPERTS, HIDDEN, LAYERS, MODELS, VOCABULARY, WIDTH


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return x * self.weight


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleDict(
            {"query": nn.Linear(WIDTH, WIDTH), "output": nn.Linear(WIDTH, WIDTH)}
        )
        self.dense = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm = Norm()

    def forward(self, x):
        mixed = torch.tanh(self.attention["query"](self.norm(x)))
        x = x + self.attention["output"](mixed)
        return x + torch.tanh(self.dense(x))


class Layered(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.zeros(1, 5, WIDTH))
        self.blocks = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        x = self.embed(x) + self.position
        for block in self.blocks:
            x = block(x)
        return self.classifier(x.mean(dim=-2))


class Convolution(nn.Module):
    def __init__(self, make, window):
        super().__init__()
        self.conv = make(3, 4, window, stride=2, padding=1, bias=False)

    def forward(self, x):
        return self.conv(x)


class HFConv1D(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict(
            {"first": Conv1D(HIDDEN, WIDTH), "second": Conv1D(CLASSES, HIDDEN)}
        )

    def forward(self, x):
        return self.block["second"](torch.tanh(self.block["first"](x)))


class ExpertStack(nn.Module):
    def __init__(self, is_transposed, hidden):
        super().__init__()
        self.is_transposed = is_transposed
        up, down = (EXPERTS, WIDTH, hidden), (EXPERTS, hidden, WIDTH)
        # `up` before `down`, although the alphabet has it otherwise.
        self.up = nn.Parameter(torch.zeros(up if is_transposed else (up[0], up[2], up[1])))
        self.down = nn.Parameter(
            torch.zeros(down if is_transposed else (down[0], down[2], down[1]))
        )

    def forward(self, x):
        kernel = "eio" if self.is_transposed else "eoi"
        hidden = torch.tanh(torch.einsum(f"bi,{kernel}->beo", x, self.up))
        return torch.einsum(f"bei,{kernel}->bo", hidden, self.down)


class Mixer(nn.Module):
    def __init__(self, is_transposed):
        super().__init__()
        self.stores_inputs_first = is_transposed
        shape = (WIDTH, CLASSES) if is_transposed else (CLASSES, WIDTH)
        self.mix = nn.Parameter(torch.zeros(shape))

    def forward(self, x):
        return x @ (self.mix if self.stores_inputs_first else self.mix.T)


class Experts(nn.Module):
    def __init__(self, is_transposed, hidden=HIDDEN):
        super().__init__()
        self.experts = ExpertStack(is_transposed, hidden)
        self.mixer = Mixer(is_transposed)

    def forward(self, x):
        return self.mixer(self.experts(x))


TWINS = {
    "layered": Layered,
    "stacked": Layered,
    "conv1d": lambda: Convolution(nn.Conv1d, 3),
    "conv2d": lambda: Convolution(nn.Conv2d, (3, 2)),
    "conv2d_output_first": lambda: Convolution(nn.Conv2d, (3, 2)),
    "conv2d_pointwise": lambda: Convolution(nn.Conv2d, 1),
    "conv3d": lambda: Convolution(nn.Conv3d, (3, 1, 2)),
    "hf_conv1d": HFConv1D,
    "experts": lambda: Experts(is_transposed=False),
    "experts_transposed": lambda: Experts(is_transposed=True),
    "experts_square": lambda: Experts(is_transposed=False, hidden=WIDTH),
    "experts_square_transposed": lambda: Experts(is_transposed=True, hidden=WIDTH),
}


def twin(name):
    """Returns the PyTorch model with the same weights as the JAX one."""
    model = MODELS[name]
    tree = named_tree(model.params(), model.names, None)
    state = {
        parameter: torch.from_numpy(
            np.array(leaf.layout.file_weight(taken(leaf.leaf, leaf, place)))
        )
        for parameter, (leaf, place) in tree.by_name.items()
    }
    module = TWINS[name]()
    module.load_state_dict(state)
    return module.eval()


def inputs(name):
    return torch.from_numpy(MODELS[name].inputs)
