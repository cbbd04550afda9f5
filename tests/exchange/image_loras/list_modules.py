"""Writes which layers Stable Diffusion 1.5 has, as PyTorch names and shapes them, without weights.

It needs diffusers and transformers, whose classes are made with the settings of the published
model: python -m tests.exchange.image_loras.list_modules
"""

import json
from pathlib import Path

FILE = Path(__file__).with_name("stable_diffusion_1_5.json")
LAYERS = ("Linear", "Conv2d")


def listed() -> dict[str, dict[str, list[int]]]:
    """Returns the shape of the weight of each linear layer and convolution, by component."""
    import diffusers
    import torch
    import transformers

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8
        )
        text = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
            )
        )
    return {
        component: {
            name: list(module.weight.shape)
            for name, module in model.named_modules()
            if type(module).__name__.endswith(LAYERS)
        }
        for component, model in (("unet", unet), ("text_encoder", text))
    }


if __name__ == "__main__":
    lines = [
        f'  "{component}": {{\n'
        + ",\n".join(f'    "{name}": {json.dumps(shape)}' for name, shape in layers.items())
        + "\n  }"
        for component, layers in listed().items()
    ]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
