"""The pictures that all studies draw, without a display."""

import numpy as np

from experiments.common.plots import save_losses

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def test_losses(tmp_path):
    path = tmp_path / "loss.png"
    losses = {"pretraining": np.linspace(2, 0, 200), "fine-tuning": np.ones(1)}
    save_losses(path, losses, title="title")
    assert path.read_bytes().startswith(PNG_SIGNATURE)
