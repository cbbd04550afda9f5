"""Small models as plain JAX functions, with the rules for the names of their PyTorch twins."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.exchange.peft import Rule

VOCABULARY, WIDTH, HEADS, HEAD_WIDTH, HIDDEN, CLASSES, LAYERS, EXPERTS = 11, 8, 2, 4, 12, 3, 3, 2


@dataclasses.dataclass(frozen=True)
class Model:
    """A model with what a test does with it.

    Attributes:
      params: makes its parameters.
      apply: computes `apply(params, x)`.
      names: the rules for its PyTorch twin, which `torch_models.TWINS` has under the same name.
      inputs: what to compute with.
      targets: what to adapt, for `wrap`.
      axes: the axes of weights, for `wrap`.
    """

    params: Callable[[], Any]
    apply: Callable[[Any, Any], jax.Array]
    names: tuple[Rule, ...]
    inputs: np.ndarray
    targets: tuple[str, ...]
    axes: dict[str, tuple[str, ...]]


def random_tree(shapes, seed=0):
    """Returns a tree of random arrays of these shapes."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(generator.normal(0, 0.5, shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def layer_shapes(stack=()):
    return {
        "query": {
            "kernel": (*stack, WIDTH, HEADS, HEAD_WIDTH),
            "bias": (*stack, HEADS, HEAD_WIDTH),
        },
        "output": {"kernel": (*stack, HEADS, HEAD_WIDTH, WIDTH), "bias": (*stack, WIDTH)},
        "dense": {"kernel": (*stack, WIDTH, WIDTH)},
        "norm": {"scale": (*stack, WIDTH)},
    }


def apply_layer(params, x):
    query = jnp.einsum("...i,iho->...ho", x * params["norm"]["scale"], params["query"]["kernel"])
    mixed = jnp.tanh(query + params["query"]["bias"])
    output = jnp.einsum("...ho,hoi->...i", mixed, params["output"]["kernel"])
    x = x + output + params["output"]["bias"]
    return x + jnp.tanh(x @ params["dense"]["kernel"])


def around_layers(params, tokens, layers):
    """Returns the logits, with `layers` computed between the embedding and the classifier."""
    x = params["embed"]["embedding"][tokens] + params["position"]
    x = layers(x).mean(axis=-2)
    return x @ params["classifier"]["kernel"] + params["classifier"]["bias"]


def apply_layered(params, tokens):
    def layers(x):
        for number in range(LAYERS):
            x = apply_layer(params[f"layer_{number}"], x)
        return x

    return around_layers(params, tokens, layers)


def apply_stacked(params, tokens):
    def layers(x):
        return jax.lax.scan(lambda x, layer: (apply_layer(layer, x), None), x, params["layers"])[0]

    return around_layers(params, tokens, layers)


OUTSIDE_SHAPES = {
    "embed": {"embedding": (VOCABULARY, WIDTH)},
    "position": (1, 5, WIDTH),
    "classifier": {"kernel": (WIDTH, CLASSES), "bias": (CLASSES,)},
}
OUTSIDE_NAMES = (
    Rule("embed.weight", "embed/embedding", kind="embedding"),
    Rule("position", "position", kind="array"),
    Rule("classifier.weight", "classifier/kernel"),
    Rule("classifier.bias", "classifier/bias"),
)
QUERY_AXES, OUTPUT_AXES = ("in", "out", "out"), ("in", "in", "out")


def stacked(axes):
    return ("batch", *axes)


LAYERED_NAMES = (
    Rule("blocks.{n}.attention.query.weight", "layer_{n}/query/kernel", axes=QUERY_AXES),
    Rule("blocks.{n}.attention.query.bias", "layer_{n}/query/bias", axes=("out", "out")),
    Rule("blocks.{n}.attention.output.weight", "layer_{n}/output/kernel", axes=OUTPUT_AXES),
    Rule("blocks.{n}.attention.output.bias", "layer_{n}/output/bias"),
    Rule("blocks.{n}.dense.weight", "layer_{n}/dense/kernel"),
    Rule("blocks.{n}.norm.weight", "layer_{n}/norm/scale"),
    *OUTSIDE_NAMES,
)
STACKED_NAMES = (
    Rule("blocks.{n}.attention.query.weight", "layers/query/kernel", axes=stacked(QUERY_AXES)),
    Rule("blocks.{n}.attention.query.bias", "layers/query/bias", axes=("batch", "out", "out")),
    Rule("blocks.{n}.attention.output.weight", "layers/output/kernel", axes=stacked(OUTPUT_AXES)),
    Rule("blocks.{n}.attention.output.bias", "layers/output/bias"),
    Rule("blocks.{n}.dense.weight", "layers/dense/kernel"),
    Rule("blocks.{n}.norm.weight", "layers/norm/scale"),
    *OUTSIDE_NAMES,
)
TOKENS = np.random.default_rng(1).integers(0, VOCABULARY, (4, 5))
TEXT_TARGETS = ("embed", "query", "output", "dense")


def layered_params():
    layers = {f"layer_{number}": layer_shapes() for number in range(LAYERS)}
    return random_tree({**layers, **OUTSIDE_SHAPES})


def stacked_params():
    """Returns the same numbers as `layered_params`, in a stack."""
    params = layered_params()
    layers = [params.pop(f"layer_{number}") for number in range(LAYERS)]
    return {**params, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def convolution(axes, window, *, output_first=False):
    """Returns a model of one convolution over so many axes."""
    spatial = "DHW"[-axes:]
    kernel_spec = f"OI{spatial}" if output_first else f"{spatial}IO"
    sizes = {"I": 3, "O": 4, **dict(zip(spatial, window, strict=True))}
    roles = tuple("out" if letter == "O" else "in" for letter in kernel_spec)

    def apply(params, x):
        return jax.lax.conv_general_dilated(
            x,
            params["conv"]["kernel"],
            window_strides=(2,) * axes,
            padding=[(1, 1)] * axes,
            dimension_numbers=(f"NC{spatial}", kernel_spec, f"NC{spatial}"),
        )

    def params():
        kernel = random_tree({"kernel": (sizes["O"], sizes["I"], *window)})["kernel"]
        return {
            "conv": {"kernel": kernel.transpose([f"OI{spatial}".index(x) for x in kernel_spec])}
        }

    return Model(
        params=params,
        apply=apply,
        names=(Rule("conv.weight", "conv/kernel", kind="conv", axes=roles),),
        inputs=np.random.default_rng(2).normal(size=(2, 3, *(6,) * axes)).astype(np.float32),
        targets=("conv",),
        axes={"conv": roles},
    )


def apply_hf_conv1d(params, x):
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    return hidden @ params["second"]["kernel"] + params["second"]["bias"]


def apply_experts(params, x):
    hidden = jnp.tanh(jnp.einsum("bi,eio->beo", x, params["up"]))
    return jnp.einsum("bei,eio->bo", hidden, params["down"]) @ params["mix"]


def experts(*, transposed, hidden=HIDDEN):
    """Returns a model whose weights are two parameters of one module, and one of another."""
    axes = ("batch", "in", "out")
    return Model(
        params=lambda: random_tree(
            {
                "up": (EXPERTS, WIDTH, hidden),
                "down": (EXPERTS, hidden, WIDTH),
                "mix": (WIDTH, CLASSES),
            }
        ),
        apply=apply_experts,
        # In the order in which the PyTorch module defines them, which is not that of the tree.
        names=(
            Rule("experts.up", "up", kind="parameter", transposed=transposed, axes=axes),
            Rule("experts.down", "down", kind="parameter", transposed=transposed, axes=axes),
            Rule("mixer.mix", "mix", kind="parameter", transposed=transposed),
        ),
        inputs=np.random.default_rng(3).normal(size=(4, WIDTH)).astype(np.float32),
        targets=("up", "down", "mix"),
        axes={"up": axes, "down": axes},
    )


MODELS = {
    "layered": Model(
        layered_params,
        apply_layered,
        LAYERED_NAMES,
        TOKENS,
        TEXT_TARGETS,
        {"query/kernel": QUERY_AXES, "output/kernel": OUTPUT_AXES},
    ),
    "stacked": Model(
        stacked_params,
        apply_stacked,
        STACKED_NAMES,
        TOKENS,
        TEXT_TARGETS,
        {
            "query/kernel": stacked(QUERY_AXES),
            "output/kernel": stacked(OUTPUT_AXES),
            "dense/kernel": ("batch", "in", "out"),
        },
    ),
    "conv1d": convolution(1, (3,)),
    "conv2d": convolution(2, (3, 2)),
    "conv2d_output_first": convolution(2, (3, 2), output_first=True),
    "conv2d_pointwise": convolution(2, (1, 1)),
    "conv3d": convolution(3, (3, 1, 2)),
    "hf_conv1d": Model(
        lambda: random_tree(
            {
                "first": {"kernel": (WIDTH, HIDDEN), "bias": (HIDDEN,)},
                "second": {"kernel": (HIDDEN, CLASSES), "bias": (CLASSES,)},
            }
        ),
        apply_hf_conv1d,
        (
            Rule("block.{name}.weight", "{name}/kernel", transposed=True),
            Rule("block.{name}.bias", "{name}/bias"),
        ),
        np.random.default_rng(4).normal(size=(5, WIDTH)).astype(np.float32),
        ("first", "second"),
        {},
    ),
    "experts": experts(transposed=False),
    "experts_transposed": experts(transposed=True),
    "experts_square": experts(transposed=False, hidden=WIDTH),
    "experts_square_transposed": experts(transposed=True, hidden=WIDTH),
}
