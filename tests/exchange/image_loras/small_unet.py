"""A small tree with the layers of a U-Net that files of adapters name."""

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from lora_jax.exchange.peft import Rule
from tests.trained import as_if_trained

CONV = ("in", "in", "in", "out")
# The name in PyTorch, the path, and the shape here, of each weight.
LAYERS = {
    "mid_block.attentions.0.proj_in": ("mid/proj_in", (1, 1, 8, 8)),
    "mid_block.attentions.0.attn1.to_q": ("mid/to_q", (8, 8)),
    "mid_block.attentions.0.attn1.to_out.0": ("mid/to_out", (8, 8)),
    "down_blocks.0.resnets.1.conv1": ("down/conv1", (3, 3, 4, 8)),
    "down_blocks.0.resnets.1.time_emb_proj": ("down/time", (6, 8)),
}
NAMES = [
    Rule(
        f"{name}.weight",
        f"{path}/kernel",
        kind="conv" if len(shape) == 4 else "linear",
        axes=CONV if len(shape) == 4 else None,
    )
    for name, (path, shape) in LAYERS.items()
]


def params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    tree: dict = {}
    for path, shape in LAYERS.values():
        block, layer = path.split("/")
        kernel = jnp.asarray(rng.standard_normal(shape), dtype)
        tree.setdefault(block, {})[layer] = {"kernel": kernel}
    return tree


def wrapped(targets="mid|down", **settings):
    axes = {f"{path}/kernel": CONV for path, shape in LAYERS.values() if len(shape) == 4}
    settings = {"rank": 2, "alpha": 3, **settings}
    return as_if_trained(lora_jax.wrap(params(), targets, axes=axes, **settings))


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for leaf, its_other in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert leaf.dtype == its_other.dtype
        np.testing.assert_array_equal(leaf, its_other)
