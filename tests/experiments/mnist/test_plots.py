"""The picture of the MNIST study."""

from experiments.mnist.plots import save_wrong_counts

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def test_wrong_counts(tmp_path):
    path = tmp_path / "wrong_counts.png"
    counts = {"base": list(range(10)), "adapted": list(range(10, 0, -1))}
    save_wrong_counts(path, counts, tuned_digit=3, title="title")
    assert path.read_bytes().startswith(PNG_SIGNATURE)
    assert list(tmp_path.iterdir()) == [path]
