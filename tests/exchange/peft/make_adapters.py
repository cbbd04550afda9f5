"""Writes adapters of small random models with PEFT itself.

    python -m tests.exchange.peft.make_adapters DIR

Each is a folder with the adapter's two files and `outputs.npy`, what PEFT computes with it.
"""

import sys
from pathlib import Path

import numpy as np
import peft
import torch

from tests.exchange.peft.torch_models import inputs, twin

LINEAR = ["query", "output", "dense"]
EVERYWHERE = ["embed", *LINEAR]

# Which model, and what the config says beside r=4, lora_alpha=6.
RECIPES = {
    "linear": ("layered", {"target_modules": LINEAR}),
    "some_layers": (
        "layered",
        {"target_modules": LINEAR, "layers_to_transform": [0, 2], "layers_pattern": "blocks"},
    ),
    "by_expression": ("layered", {"target_modules": r".*\.(query|dense)"}),
    "rslora": ("layered", {"target_modules": LINEAR, "use_rslora": True}),
    "patterns": (
        "layered",
        {
            "target_modules": LINEAR,
            "rank_pattern": {
                "query": 2,
                "^blocks.0.dense": 3,
                "blocks.1.dense": 3,
                "blocks.2.dense": 3,
            },
            "alpha_pattern": {"attention.output": 5, r".*\.dense": 0.7},
        },
    ),
    "patterns_rslora": (
        "layered",
        {"target_modules": LINEAR, "rank_pattern": {"query": 3}, "use_rslora": True},
    ),
    "dora": ("layered", {"target_modules": EVERYWHERE, "use_dora": True}),
    "dora_rslora": ("layered", {"target_modules": LINEAR, "use_dora": True, "use_rslora": True}),
    "embedding": ("layered", {"target_modules": EVERYWHERE}),
    "gaussian": ("layered", {"target_modules": LINEAR, "init_lora_weights": "gaussian"}),
    "orthogonal": ("layered", {"target_modules": LINEAR, "init_lora_weights": "orthogonal"}),
    "mica": ("layered", {"target_modules": LINEAR, "init_lora_weights": "mica"}),
    "bias_of_adapted": ("layered", {"target_modules": ["query"], "bias": "lora_only"}),
    "bias_of_all": ("layered", {"target_modules": ["query"], "bias": "all"}),
    "saved_modules": (
        "layered",
        {"target_modules": LINEAR, "modules_to_save": ["classifier", "norm"]},
    ),
    "saved_modules_and_bias": (
        "layered",
        {"target_modules": ["query"], "modules_to_save": ["classifier"], "bias": "all"},
    ),
    "conv1d": ("conv1d", {"target_modules": ["conv"]}),
    "conv2d": ("conv2d", {"target_modules": ["conv"]}),
    "conv2d_pointwise": ("conv2d_pointwise", {"target_modules": ["conv"]}),
    "conv3d": ("conv3d", {"target_modules": ["conv"]}),
    "conv1d_dora": ("conv1d", {"target_modules": ["conv"], "use_dora": True}),
    "conv2d_dora": ("conv2d", {"target_modules": ["conv"], "use_dora": True}),
    "conv3d_dora": ("conv3d", {"target_modules": ["conv"], "use_dora": True}),
    "hf_conv1d": ("hf_conv1d", {"target_modules": ["first", "second"], "fan_in_fan_out": True}),
    "hf_conv1d_dora": (
        "hf_conv1d",
        {"target_modules": ["first", "second"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "hf_conv1d_saved": (
        "hf_conv1d",
        {"target_modules": ["first"], "fan_in_fan_out": True, "modules_to_save": ["second"]},
    ),
    "experts": ("experts", {"target_parameters": ["experts.up", "experts.down", "mixer.mix"]}),
    "one_parameter": ("experts", {"target_parameters": ["experts.up"]}),
    "experts_transposed": (
        "experts_transposed",
        {
            "target_parameters": ["experts.down", "experts.up", "mixer.mix"],
            "alpha_pattern": {"up": 3},
        },
    ),
    "experts_square": ("experts_square", {"target_parameters": ["experts.up", "experts.down"]}),
    "experts_square_transposed": (
        "experts_square_transposed",
        {"target_parameters": ["experts.up", "experts.down"]},
    ),
}


def make_adapter(folder, recipe, dtype=torch.float32):
    """Writes one adapter with random numbers in all that trains."""
    name, options = RECIPES[recipe]
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": [], **options})
    torch.manual_seed(0)
    model = peft.get_peft_model(twin(name).to(dtype), config, autocast_adapter_dtype=False)
    generator = np.random.default_rng(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.from_numpy(generator.normal(0, 0.3, parameter.shape))
                parameter.add_(noise.to(parameter.dtype))
        outputs = model.eval()(inputs(name))
    model.save_pretrained(folder)
    np.save(Path(folder) / "outputs.npy", outputs.float().numpy())


def main(folder):
    """Writes all of them."""
    for recipe in RECIPES:
        make_adapter(Path(folder) / recipe, recipe)


if __name__ == "__main__":
    main(sys.argv[1])
