"""Two processes that save to one path: whoever reads finds what one of them saved."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from lora_jax.exchange import peft

ROOT = Path(__file__).parents[2]
NAMES = [peft.Rule("dense.weight", "kernel")]


def params():
    return {"kernel": jnp.zeros((4, 3))}


def save(folder, number):
    """Saves adapters in both formats, in which the factors and the scale say the same number."""
    wrapped = lora_jax.wrap(params(), "kernel", rank=1, alpha=number)
    adapters, frozen = lora_jax.split(wrapped)
    wrapped = lora_jax.combine(jax.tree.map(lambda leaf: 0 * leaf + number, adapters), frozen)
    lora_jax.save(folder / "adapters", wrapped, overwrite=True)
    peft.save(folder / "peft", wrapped, names=NAMES, overwrite=True)


def main(folder):
    for number in range(1, 7):
        save(Path(folder), number)


def test_two_processes_save_to_one_path(tmp_path):
    save(tmp_path, 100)
    other = subprocess.Popen(
        [sys.executable, "-m", "tests.checkpoint.test_processes", str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    seen = set()
    while other.poll() is None:
        save(tmp_path, 101)
        for restored in (
            lora_jax.restore(tmp_path / "adapters", params()),
            peft.load(tmp_path / "peft", params(), names=NAMES),
        ):
            weight = restored["kernel"]
            numbers = {float(weight.scale), *np.ravel(weight.lora_A), *np.ravel(weight.lora_B)}
            assert len(numbers) == 1
            seen |= numbers
    assert (other.returncode, other.communicate()[1]) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters", "peft"]
    assert 101 in seen


if __name__ == "__main__":
    main(sys.argv[1])
