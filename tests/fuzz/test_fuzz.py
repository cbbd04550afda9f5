"""A few hundred random programs, the same each time; `python -m tests.fuzz` runs any number."""

import numpy as np
import pytest

from tests.fuzz import running
from tests.fuzz.__main__ import main
from tests.typechecking import annotations_unchecked

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("promoted_ranks")]

SEED, CHUNKS, CASES = 0, 12, 15


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_adapted_is_dense(chunk: int) -> None:
    cases = range(chunk * CASES, (chunk + 1) * CASES)
    failed = [text for _, text in running.failures(SEED, cases[:5]) if text]
    with annotations_unchecked():
        failed += [text for _, text in running.failures(SEED, cases[5:]) if text]
    assert not failed, "\n".join(failed)


def test_a_norm_that_all_but_cancels_is_compared_by_its_parts() -> None:
    """DoRA's norm of a feature with two inputs, a fiftieth of the weight's and of the change's."""
    assert not running.reason_against(running.program_of(20261126, 2094))


def test_a_case_is_what_its_seed_and_number_say() -> None:
    programs = [str(running.program_of(3, case)) for case in (1, 1, 2)]
    assert programs[0] == programs[1] != programs[2]


def test_a_failure_is_printed_as_its_smallest_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A transform that forgets the adapters fails where weights are used, in one line."""
    monkeypatch.setattr(
        running.lora_jax,
        "adapt",
        lambda fn, **_: lambda wrapped, x: fn({k: w.base for k, w in wrapped.items()}, x),
    )
    assert main(["--seed", "0", "--case", "5"]) == 1
    output = capsys.readouterr().out
    assert "python -m tests.fuzz --seed 0 --case 5: " in output
    program = output.partition("def program(p, x):\n")[2].partition("\n\n")[0].splitlines()
    assert len(program) <= 4
    assert "1 cases from seed 0, 1 failures" in output


def test_its_numbers_are_not_zero() -> None:
    """A program whose results vanish would agree with anything."""
    program = running.program_of(0, 7)
    params = {
        name: np.ones(layout.shape, np.float32) for name, (layout, *_) in program.weights.items()
    }
    results = program.function()(params, np.ones((3, 192), np.float32))
    assert any(np.any(np.asarray(result)) for result in results.values())
