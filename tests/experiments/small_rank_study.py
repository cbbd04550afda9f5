"""The study of ranks with a small network, here and as a command.

The weights of the true one take seconds to decompose. The command
`python -m tests.experiments.small_rank_study`
takes the arguments of `python -m experiments.rank_study`.
"""

import sys

import pytest

import lora_jax
from experiments import rank_study
from experiments.mnist import network, task
from experiments.models.mlp import MLP
from experiments.ranks import cells, methods

HIDDEN = (100, 200)


def patch(patched: pytest.MonkeyPatch) -> None:
    """Puts a small network in the place of the true one, wherever the study reads it."""
    small = MLP(HIDDEN, network.NETWORK.classes, network.normalised)
    for module in (network, task, cells, methods, rank_study):
        patched.setattr(module, "NETWORK", small)
    adapted = lora_jax.adapt(small.apply)
    for module in (network, task, cells):
        patched.setattr(module, "ADAPTED_APPLY", adapted)
    patched.setattr(cells, "_TIMING_ROUNDS", 1)
    patched.setattr(cells, "_STEPS_TIMED_AT_ONCE", 1)


if __name__ == "__main__":
    patch(pytest.MonkeyPatch())
    sys.exit(rank_study.main())
