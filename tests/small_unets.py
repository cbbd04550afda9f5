"""Small U-Nets of diffusers in the shapes of Stable Diffusion, and what they are given."""

from pathlib import Path
from typing import Any

import numpy as np

_SHAPES: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "norm_num_groups": 8,
}
# Cut down: 1.5 has as many heads everywhere, 2.1 more at coarse resolutions, and linear layers.
UNETS: dict[str, dict[str, Any]] = {
    "1.5": {**_SHAPES, "attention_head_dim": 4, "layers_per_block": 2},
    "2.1": {
        **_SHAPES,
        "attention_head_dim": [2, 4],
        "layers_per_block": 1,
        "use_linear_projection": True,
    },
}


def torch_unet(version: str) -> Any:
    """Returns a model of diffusers with random numbers in all of its parameters."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(**UNETS[version])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def written(folder: Path, version: str) -> Path:
    """Writes the model as diffusers does, and returns the folder."""
    torch_unet(version).save_pretrained(folder)
    return folder


def given() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns noisy images, their times and encoded texts."""
    random = np.random.default_rng(0)
    images = random.standard_normal((2, 8, 8, 4)).astype(np.float32)
    return images, np.array([3, 700]), random.standard_normal((2, 5, 16)).astype(np.float32)


def in_torch(model: Any, images: Any, times: Any, text: Any) -> np.ndarray:
    """Returns what a model of diffusers predicts, channels last."""
    import torch

    with torch.no_grad():
        found = model(
            torch.as_tensor(np.array(images)).permute(0, 3, 1, 2),
            torch.as_tensor(np.array(times)),
            torch.as_tensor(np.array(text)),
        )
    return found.sample.permute(0, 2, 3, 1).numpy()
