"""The picture of the study of ranks."""

from experiments.ranks.plots import Panel, save_rank_curves

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def test_rank_curves_of_one_rank_and_of_equal_numbers_too(tmp_path):
    path = tmp_path / "rank_study.png"
    values = {"LoRA": [[0.1, 0.1, 0.1], [1.0, 2.0, 4.0]], "DoRA": [[2.0], [3.0]]}
    panels = [Panel("wrong answers", values), Panel("milliseconds", values)]
    save_rank_curves(path, [1, 8], panels, title="title")
    assert path.read_bytes().startswith(PNG_SIGNATURE)
    save_rank_curves(path, [8], [Panel("accuracy", {"LoRA": [[0.7, 0.7, 0.7]]})], title="title")
    assert path.read_bytes().startswith(PNG_SIGNATURE)
