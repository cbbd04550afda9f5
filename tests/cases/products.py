"""Products with a weight: contractions and convolutions."""

import jax
import jax.numpy as jnp

from tests.cases.case import case


@case({"W": (24, 20), "b": (20,)}, (24,))
def dense_vector(params, x):
    return jnp.tanh(x @ params["W"] + params["b"])


@case({"W": (24, 20)}, (5, 24))
def dense_matrix(params, x):
    return x @ params["W"]


@case({"W": (20, 24)}, (24, 5))
def weight_on_the_left(params, x):
    return params["W"] @ x


@case({"W": (20, 24)}, (5, 24))
def weight_transposed(params, x):
    return x @ params["W"].T


@case({"W": (3, 24, 20)}, (3, 5, 24), axes={"W": ("batch", "in", "out")})
def experts(params, x):
    return jnp.einsum("eti,eio->eto", x, params["W"])


@case({"W": (24, 20, 3)}, (3, 5, 24), axes={"W": ("in", "out", "batch")})
def experts_on_the_last_axis(params, x):
    return jnp.einsum("eti,ioe->eto", x, params["W"])


@case({"W": (24, 4, 6)}, (5, 24), axes={"W": ("in", "out", "out")})
def attention_query(params, x):
    return jnp.einsum("te,ehd->thd", x, params["W"])


@case({"W": (4, 6, 20)}, (5, 4, 6), axes={"W": ("in", "in", "out")})
def attention_output(params, x):
    return jnp.einsum("thd,hde->te", x, params["W"])


@case({"W": (4, 24, 20)}, (5, 24), axes={"W": ("out", "in", "out")})
def fused_axes_in_any_order(params, x):
    return jnp.einsum("ti,hio->hto", x, params["W"])


@case({"W": (24, 20)}, (5, 24, 20), how=frozenset({"dense"}))
def contraction_over_both_sides(params, x):
    return jnp.einsum("tio,io->t", x, params["W"])


@case({"W": (24, 20)}, (24, 20))
def contraction_to_a_scalar(params, x):
    return jnp.einsum("io,io->", x, params["W"])


@case({"W": (24, 24)}, (5, 24))
def used_twice(params, x):
    return jnp.tanh(x @ params["W"]) @ params["W"]


@case({"W1": (24, 22), "W2": (22, 20)}, (5, 24))
def both_operands_adapted(params, x):
    return x @ (params["W1"] @ params["W2"])


@case({"W": (24, 24)}, (5, 24))
def the_same_weight_on_both_sides(params, x):
    return x @ (params["W"] @ params["W"].T)


@case({"W": (24, 20)}, (5, 24))
def precision_is_kept(params, x):
    return jnp.dot(x, params["W"], precision="highest", preferred_element_type=x.dtype)


_MERGED = frozenset({"merged"})


@case({"W": (24, 20)}, (64, 24), how=_MERGED)
def many_rows(params, x):
    return x @ params["W"]


@case({"W": (20, 24)}, (64, 24), how=_MERGED)
def many_rows_transposed(params, x):
    return jnp.tanh(params["W"] @ x.T)


@case({"W": (24, 4, 6)}, (8, 8, 24), axes={"W": ("in", "out", "out")}, how=_MERGED)
def many_rows_into_heads(params, x):
    return jnp.einsum("bte,ehd->bthd", x, params["W"])


@case({"W": (4, 6, 20)}, (8, 8, 4, 6), axes={"W": ("in", "in", "out")}, how=_MERGED)
def many_rows_of_heads(params, x):
    return jnp.einsum("bthd,hde->bte", x, params["W"])


@case({"W": (3, 24, 20)}, (3, 64, 24), axes={"W": ("batch", "in", "out")}, how=_MERGED)
def many_rows_of_experts(params, x):
    return jnp.einsum("eti,eio->eto", x, params["W"])


@case({"W": (4, 3)}, (50, 4), how=frozenset({"dense"}))
def weight_smaller_than_its_factors(params, x):
    return x @ params["W"]


_CONV_2D = ("in", "in", "in", "out")


def _convolved(x, kernel, dimensions, strides=None, padding="SAME", **options):
    spatial = x.ndim - 1
    return jax.lax.conv_general_dilated(
        x[None], kernel, strides or (1,) * spatial, padding, dimension_numbers=dimensions, **options
    )[0]


@case({"W": (3, 8, 12)}, (10, 8), axes={"W": ("in", "in", "out")})
def conv_1d(params, x):
    return _convolved(x, params["W"], ("NWC", "WIO", "NWC"), (2,))


@case({"W": (3, 3, 6, 10)}, (8, 8, 6), axes={"W": _CONV_2D})
def conv_2d(params, x):
    return _convolved(x, params["W"], ("NHWC", "HWIO", "NHWC"))


@case({"W": (10, 6, 3, 3)}, (6, 8, 8), axes={"W": ("out", "in", "in", "in")})
def conv_2d_channels_first(params, x):
    return _convolved(x, params["W"], ("NCHW", "OIHW", "NCHW"))


@case({"W": (3, 3, 6, 10)}, (9, 9, 6), axes={"W": _CONV_2D})
def conv_strided_padded_dilated(params, x):
    return _convolved(
        x,
        params["W"],
        ("NHWC", "HWIO", "NHWC"),
        (2, 1),
        ((2, 1), (0, 3)),
        lhs_dilation=(1, 2),
        rhs_dilation=(2, 1),
    )


@case({"W": (3, 3, 8, 16)}, (8, 8, 16), axes={"W": _CONV_2D})
def conv_grouped(params, x):
    return _convolved(x, params["W"], ("NHWC", "HWIO", "NHWC"), feature_group_count=2)


@case({"W": (3, 3, 1, 8)}, (8, 8, 8), axes={"W": _CONV_2D}, how=frozenset({"dense"}))
def conv_depthwise(params, x):
    return _convolved(x, params["W"], ("NHWC", "HWIO", "NHWC"), feature_group_count=8)


@case({"W": (2, 3, 2, 4, 10)}, (4, 5, 4, 4), axes={"W": ("in",) * 4 + ("out",)})
def conv_3d(params, x):
    return _convolved(x, params["W"], ("NDHWC", "DHWIO", "NDHWC"))


@case({"W": (3, 3, 6, 10)}, (6, 6, 6), axes={"W": _CONV_2D})
def conv_transposed(params, x):
    return jax.lax.conv_transpose(
        x[None], params["W"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )[0]


@case({"W": (3, 3, 10, 6)}, (6, 6, 6), axes={"W": ("in", "in", "out", "in")})
def conv_transposed_with_a_transposed_kernel(params, x):
    return jax.lax.conv_transpose(
        x[None],
        params["W"],
        (2, 2),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        transpose_kernel=True,
    )[0]
