"""Quantising the weights of a parameter tree, and back."""

from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import jax

from lora_jax._finite import not_finite
from lora_jax._paths import listed, map_with_paths
from lora_jax._selection import selected_weights
from lora_jax._targets import Selection, Targets
from lora_jax.quantization._encode import Encoding
from lora_jax.quantization._programs import quantized_in_place
from lora_jax.quantization._weight import is_quantized

_SETTINGS = ("format", "block", "double_quantize")


def quantize(
    params: Any,
    targets: Targets,
    *,
    format: str = "nf4",  # noqa: A002 - the word of the field
    block: SupportsIndex | None = 64,
    axes: Mapping[str, Sequence[str]] | None = None,
    exclude: Targets | None = None,
    double_quantize: bool | None = None,
) -> Any:
    r"""Returns params with a `QuantizedWeight` in place of each weight that `targets` selects.

    Along the flattened input axes, every `block` neighbours share a scale s: with the largest of
    them, $s = \max_i |w_i| / c_{\max}$, and $w_i$ becomes the code q whose number $c_q$ is nearest
    to $w_i / s$. It dequantises to $s\,c_q$, in the dtype of the weight. `wrap` adapts quantised
    weights, and `adapt` computes with them, adapted or not.

    Weights are quantised one after the other, a stack matrix by matrix, so that the memory beside
    params and result is that of one matrix. It works under `jit`, on arrays that are cut over a
    mesh, and on abstract trees of `jax.ShapeDtypeStruct`.

    Args:
      params: the parameter tree.
      targets: what to quantise, in the forms of `wrap`; a mapping may override `format`, `block`
        and `double_quantize` for what an expression matches.
      format: `"nf4"`, 16 quantiles of a normal distribution, 4.13 bits a weight; `"int4"` and
        `"int8"`, whole numbers from -7 to 7 and from -127 to 127; `"fp8_e4m3"`, float8 numbers
        with the largest weight at 448.
      block: how many weights share a scale; None for all inputs of an output feature. Formats of
        float8 numbers take 64, the default, for None: their exponents do what blocks do.
      axes: the role of each axis, as for `wrap`; blocks run along the inputs.
      exclude: which of the selected weights to leave as they are.
      double_quantize: whether the scales are quantised too: to 8 bits in blocks of 256, after their
        mean is taken out. By default with `"nf4"` only.

    Returns:
      A tree of the same structure, with `QuantizedWeight` nodes.

    Raises:
      ValueError: `format` or `block` is none of these; an argument does not fit `params`; a
        selected weight holds NaN or infinity. Nothing is changed then.
      TypeError: an argument has the wrong type.

    Source: Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023, sections 2 and 3;
    Micikevicius et al., FP8 Formats for Deep Learning, 2022.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> params = {"dense": {"kernel": jnp.ones((128, 3)), "bias": jnp.zeros(3)}}
      >>> quantized = lora_jax.quantize(params, "dense", format="int8")
      >>> quantized["dense"]["kernel"].codes.dtype, quantized["dense"]["bias"].dtype
      (dtype('int8'), dtype('float32'))
      >>> wrapped = lora_jax.wrap(quantized, "dense", rank=2)
    """
    defaults = {"format": format, "block": block, "double_quantize": double_quantize}
    Encoding.checked("`quantize`", **defaults)
    selected = selected_weights(params, targets, exclude=exclude, axes=axes)
    encodings = {
        path: Encoding.checked(
            f"`targets` for '{path}'", **{**defaults, **_overrides(path, each.selection)}
        )
        for path, each in selected.items()
    }
    already = [path for path, each in selected.items() if is_quantized(each.leaf)]
    if already:
        raise ValueError(
            f"`targets` selects weights that are quantised already: {listed(already)}; leave them "
            "out, or quantise what quantization.dequantize(params) returns."
        )
    _check_finite({path: each.leaf for path, each in selected.items()})
    return map_with_paths(
        lambda path, leaf: (
            quantized_in_place(leaf, selected[path].axes, encodings[path])
            if path in selected
            else leaf
        ),
        params,
    )


def _overrides(path: str, selection: Selection) -> Mapping[str, Any]:
    unknown = sorted(set(selection.overrides) - set(_SETTINGS))
    if unknown:
        raise ValueError(
            f"`targets` overrides {listed(unknown)} for '{path}'; expected some of "
            f"{listed(_SETTINGS)}."
        )
    return selection.overrides


def _check_finite(weights: Mapping[str, Any]) -> None:
    concrete = [
        (path, leaf) for path, leaf in weights.items() if not isinstance(leaf, jax.ShapeDtypeStruct)
    ]
    found = not_finite(concrete)
    if found:
        raise ValueError(
            f"`params` holds values that are not finite at {listed(found)}, which no scale "
            "represents; nothing is quantised. Leave these out with quantize(..., exclude=...)."
        )
