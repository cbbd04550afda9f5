"""The tables of what formats cost in accuracy."""

from benchmarks import quantized_accuracy


def test_a_cell_is_the_mean_over_seeds_and_the_greatest_less_the_least():
    def row(name, seed, errors):
        return {"format": name, "seed": seed, "digit": 4, "errors": errors}

    rows = [row("dense", 0, 400), row("dense", 1, 410), row("nf4", 0, 401), row("nf4", 1, 401)]
    accuracies = [{"format": "dense", "seed": seed, "accuracy": 0.75 + seed / 4} for seed in (0, 1)]
    errors, accuracy = quantized_accuracy.tables(
        {"seeds": 2, "studies": {"mnist": rows, "text": accuracies}}
    )
    assert errors.header == ["format", "errors"]
    assert errors.rows == [["dense", "405.0 (10.0)"], ["nf4", "401.0 (0.0)"]]
    assert accuracy.rows == [["dense", "0.8750 (0.2500)"]]
