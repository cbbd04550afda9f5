"""What the tests of training checkpoints do with them."""

import jax

from lora_jax.checkpoint import TrainingCheckpoints


def trained_state(state, seed=7):
    """Returns an optimiser's state with random numbers, as after some steps."""
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [jax.random.normal(key, x.shape).astype(x.dtype) for key, x in zip(keys, leaves)]  # noqa: B905
    return jax.tree.unflatten(structure, noise)


def round_trip(folder, wrapped, state, *into, **what):
    """Returns what is restored of one checkpoint, into the same trees unless others are given."""
    with TrainingCheckpoints(folder) as checkpoints:
        checkpoints.save(1, wrapped, state, **what)
    with TrainingCheckpoints(folder) as checkpoints:
        return checkpoints.restore(*(into or (wrapped, state)))


def names(folder):
    """Returns the names of what is in a folder."""
    return sorted(path.name for path in folder.iterdir())
