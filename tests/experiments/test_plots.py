"""The pictures are drawn, without a display."""

import numpy as np

from experiments.plots import Panel, save_losses, save_rank_curves, save_wrong_counts

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def test_wrong_counts(tmp_path):
    path = tmp_path / "wrong_counts.png"
    counts = {"base": list(range(10)), "adapted": list(range(10, 0, -1))}
    save_wrong_counts(path, counts, tuned_digit=3, title="title")
    assert path.read_bytes().startswith(PNG_SIGNATURE)
    assert list(tmp_path.iterdir()) == [path]


def test_losses(tmp_path):
    path = tmp_path / "loss.png"
    losses = {"pretraining": np.linspace(2, 0, 200), "fine-tuning": np.ones(1)}
    save_losses(path, losses, title="title")
    assert path.read_bytes().startswith(PNG_SIGNATURE)


def test_rank_curves_of_one_rank_and_of_equal_numbers_too(tmp_path):
    path = tmp_path / "rank_study.png"
    values = {"LoRA": [[0.1, 0.1, 0.1], [1.0, 2.0, 4.0]], "DoRA": [[2.0], [3.0]]}
    panels = [Panel("wrong answers", values), Panel("milliseconds", values)]
    save_rank_curves(path, [1, 8], panels, title="title")
    assert path.read_bytes().startswith(PNG_SIGNATURE)
    save_rank_curves(path, [8], [Panel("accuracy", {"LoRA": [[0.7, 0.7, 0.7]]})], title="title")
    assert path.read_bytes().startswith(PNG_SIGNATURE)
