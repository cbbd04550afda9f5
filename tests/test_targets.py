"""What each form of `targets` selects, and what is said where it selects nothing."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from lora_jax._paths import leaves_with_paths
from tests.arrays import random

Shapes = dict[str, Any]

SHAPES: Shapes = {
    "encoder": {
        f"layer_{i}": {
            "query": {"kernel": (8, 8), "bias": (2, 4)},
            "query_norm": {"scale": (8, 8)},
            "mlp": {"kernel": (8, 12), "bias": (12,)},
        }
        for i in range(2)
    },
    "head": {"kernel": (8, 4), "bias": (4,)},
    "norm": {"scale": (8,)},
    "count": (),
}


def random_params(shapes: Shapes) -> Any:
    flat, structure = jax.tree.flatten(shapes, is_leaf=lambda node: isinstance(node, tuple))
    leaves = [random(*shape, seed=i) for i, shape in enumerate(flat)]
    return jax.tree.unflatten(structure, leaves)


PARAMS = {**random_params(SHAPES), "count": jnp.ones((4, 4), jnp.int32)}

QUERIES = {"encoder/layer_0/query/kernel", "encoder/layer_1/query/kernel"}
MLPS = {"encoder/layer_0/mlp/kernel", "encoder/layer_1/mlp/kernel"}
NORMS = {"encoder/layer_0/query_norm/scale", "encoder/layer_1/query_norm/scale"}


def nodes(wrapped: Any, kind: type = lora_jax.LoRAWeight) -> dict[str, Any]:
    found = leaves_with_paths(wrapped, is_leaf=lambda node: isinstance(node, kind))
    return {path: node for path, node in found if isinstance(node, kind)}


def selected(targets: Any, **options: Any) -> set[str]:
    return set(nodes(lora_jax.wrap(PARAMS, targets, rank=2, **options)))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        pytest.param("query", QUERIES, id="a segment is matched whole"),
        pytest.param("kernel", QUERIES | MLPS | {"head/kernel"}, id="the last segment"),
        pytest.param("layer_0/query", {min(QUERIES)}, id="several segments"),
        pytest.param("encoder/layer_1/mlp/kernel", {max(MLPS)}, id="a whole path"),
        pytest.param(r"layer_\d/(query|mlp)", QUERIES | MLPS, id="a group"),
        pytest.param("query|head", QUERIES | {"head/kernel"}, id="an alternative"),
        pytest.param("layer_[0]", {min(QUERIES), min(MLPS), min(NORMS)}, id="module, no biases"),
        pytest.param("query/bias", {q.replace("kernel", "bias") for q in QUERIES}, id="a bias"),
        pytest.param(["head", "query"], QUERIES | {"head/kernel"}, id="a list"),
        pytest.param(("head", "mlp/.*"), MLPS | {"head/kernel"}, id="a tuple"),
        pytest.param(lambda path, leaf: leaf.shape == (8, 12), MLPS, id="a predicate"),
        pytest.param({"query": {}, "head": {}}, QUERIES | {"head/kernel"}, id="a mapping"),
    ],
)
def test_selects(targets: Any, expected: set[str]) -> None:
    assert selected(targets) == expected


def test_a_module_of_any_name_does_not_mean_its_biases() -> None:
    """An expression that ends in a wildcard names modules, as `layer_0` does."""
    assert selected("encoder/layer_.*") == QUERIES | MLPS | NORMS


def test_a_mapping_overrides_each_setting() -> None:
    wrapped = lora_jax.wrap(
        PARAMS,
        {
            "query": {"rank": 3, "alpha": 6.0},
            "mlp": {"init": "gaussian", "dtype": jnp.bfloat16},
            "head": {},
        },
        rank=2,
        alpha=1.0,
    )
    query, mlp, head = (nodes(wrapped)[path] for path in (min(QUERIES), min(MLPS), "head/kernel"))
    assert (query.rank, float(query.scale)) == (3, 2.0)
    assert (mlp.rank, mlp.lora_A.dtype) == (2, jnp.bfloat16)
    # Kaiming factors stay within 1/√8, gaussian ones of deviation 1/2 do not.
    assert jnp.abs(mlp.lora_A).max() > 8**-0.5
    assert (head.rank, float(head.scale), head.lora_A.dtype) == (2, 0.5, jnp.float32)


def test_the_first_match_counts() -> None:
    targets = {"layer_0/query": {"rank": 4}, "query": {"rank": 1}}
    ranks = {path: node.rank for path, node in nodes(lora_jax.wrap(PARAMS, targets)).items()}
    assert ranks == {min(QUERIES): 4, max(QUERIES): 1}


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        pytest.param("qurey", ValueError, "'qurey' matches no leaf.*query/kernel", id="nearest"),
        pytest.param(["query", "nope"], ValueError, "'nope' matches no leaf", id="one of several"),
        pytest.param("uery", ValueError, "matches no leaf", id="a part of a segment"),
        pytest.param("norm", ValueError, r"norm/scale \(8,\).*two or more axes", id="a vector"),
        pytest.param("count", ValueError, "two or more axes", id="integers"),
        pytest.param(lambda path, leaf: False, ValueError, "predicate matches no leaf", id="never"),
        pytest.param("query(", ValueError, r"'query\(', which is not a regular expr", id="regex"),
        pytest.param([], TypeError, r"`targets` is \[\]", id="empty"),
        pytest.param(3, TypeError, "`targets` is 3", id="a number"),
        pytest.param(None, TypeError, "`targets` is None", id="None"),
        pytest.param(["query", 3], TypeError, "holds 3", id="a number inside"),
        pytest.param({"query": 4}, TypeError, "maps 'query' to 4", id="overrides of a wrong type"),
        pytest.param(
            {"query": {"ranks": 4}}, ValueError, "overrides 'ranks'.*'rank', 'alpha'", id="a typo"
        ),
        pytest.param(
            {"query": {"rank": 0}}, ValueError, "`rank` of 'encoder/layer_0/query", id="rank 0"
        ),
        pytest.param({"query": {"alpha": -1}}, ValueError, "`alpha` of 'encoder", id="alpha"),
        pytest.param({"query": {"dtype": int}}, TypeError, "`dtype` of 'encoder", id="dtype"),
        pytest.param({"query": {"init": "no"}}, ValueError, "`init` is 'no'", id="init"),
        pytest.param("all-linear", ValueError, "infer_axes", id="all-linear without axes"),
    ],
)
def test_refuses(targets: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lora_jax.wrap(PARAMS, targets, rank=2)


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("norm", {"norm/scale"}),
        ("head", {"head/bias", "head/kernel"}),
        (["norm", "head/bias"], {"norm/scale", "head/bias"}),
    ],
)
def test_train_selects_vectors_and_biases_too(train: Any, expected: set[str]) -> None:
    wrapped = lora_jax.wrap(PARAMS, "query", rank=2, train=train)
    assert set(nodes(wrapped, lora_jax.FullWeight)) == expected


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("nope", "`train`.*'nope' matches no leaf"),
        ("count", "`train`.*floating-point array"),
        ("query/kernel", "`train`.*that `targets` does not select"),
    ],
)
def test_train_refuses(train: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora_jax.wrap(PARAMS, "query", rank=2, train=train)


# --- "all-linear" ------------------------------------------------------------------------------

LM_SHAPES: Shapes = {
    "embed": (30, 16),
    "position": (12, 16),
    "class_token": (1, 16),
    "query": {"kernel": (16, 2, 8), "bias": (2, 8)},
    "out": (2, 8, 16),
    "norms": (3, 16),
    "wide": (16, 24),
    "narrow": (24, 16),
    "head": (16, 5),
    "unused": (16, 16),
}
LM_PARAMS = random_params(LM_SHAPES)
IDS = jnp.arange(7, dtype=jnp.int32)
LINEAR = {"query/kernel", "out", "wide", "narrow"}


def hidden(params: Any, ids: jax.Array) -> jax.Array:
    h = jnp.concatenate([params["class_token"], params["embed"][ids]])
    h = h + params["position"][: h.shape[0]]
    heads = jnp.einsum("te,ehd->thd", h, params["query"]["kernel"]) + params["query"]["bias"][None]
    h = h + jnp.einsum("thd,hde->te", jnp.tanh(heads), params["out"])
    h, _ = jax.lax.scan(lambda h, scale: (jnp.tanh(h) * scale[None], None), h, params["norms"])
    return h + jnp.tanh(h @ params["wide"]) @ params["narrow"]


def classify(params: Any, ids: jax.Array) -> jax.Array:
    return hidden(params, ids)[0] @ params["head"]


def tied(params: Any, ids: jax.Array) -> jax.Array:
    return hidden(params, ids) @ params["embed"].T


@pytest.mark.parametrize("model", [classify, tied])
@pytest.mark.parametrize(
    ("targets", "more"), [("all-linear", set()), (["all-linear", "head"], {"head"})]
)
def test_all_linear(model: Any, targets: Any, more: set[str]) -> None:
    axes = lora_jax.infer_axes(model, LM_PARAMS, IDS)
    if model is tied and more:
        with pytest.raises(ValueError, match=r"head \(16, 5\): the function never uses it"):
            lora_jax.wrap(LM_PARAMS, targets, rank=2, axes=axes)
    else:
        wrapped = lora_jax.wrap(LM_PARAMS, targets, rank=2, axes=axes)
        assert set(nodes(wrapped)) == LINEAR | more


def test_all_linear_takes_overrides_and_yields_to_what_comes_before() -> None:
    axes = lora_jax.infer_axes(classify, LM_PARAMS, IDS)
    targets = {"wide": {"rank": 3}, "all-linear": {"rank": 1, "alpha": 5.0}}
    found = nodes(lora_jax.wrap(LM_PARAMS, targets, axes=axes))
    assert {path: node.rank for path, node in found.items()} == dict.fromkeys(LINEAR, 1) | {
        "wide": 3
    }
    assert float(found["narrow"].scale) == 5.0


def test_all_linear_shrinks_the_rank_to_fit_and_says_so() -> None:
    axes = lora_jax.infer_axes(classify, LM_PARAMS, IDS)
    wrapped = lora_jax.wrap(LM_PARAMS, ["all-linear", "embed"], rank=16, axes=axes)
    assert nodes(wrapped)["wide"].rank == 16
    small = {"a": jnp.ones((16, 3)), "b": jnp.ones((3, 16))}
    axes = lora_jax.infer_axes(lambda p, x: x @ p["a"] @ p["b"] + x, small, jnp.ones((2, 16)))
    wrapped = lora_jax.wrap(small, "all-linear", rank=8, axes=axes)
    assert wrapped["a"].rank == 3
    assert "3 (whole side)" in lora_jax.summary(wrapped)
    with pytest.raises(ValueError, match="`rank` is 8 for 'a'.*at most 3"):
        lora_jax.wrap(small, "a", rank=8, axes=axes)


def test_with_inferred_axes_a_module_means_what_is_used_as_a_weight() -> None:
    axes = lora_jax.infer_axes(classify, LM_PARAMS, IDS)
    assert set(nodes(lora_jax.wrap(LM_PARAMS, "query", rank=2, axes=axes))) == {"query/kernel"}
    for path, reason in [
        ("unused", "never uses it"),
        ("norms", "only 'mul at"),
        ("position", "add"),
    ]:
        with pytest.raises(ValueError, match=reason):
            lora_jax.wrap(LM_PARAMS, path, rank=2, axes=axes)


def test_tokens_joined_to_activations_are_not_weights() -> None:
    """A class token or soft prompt is an activation, also where a product follows at once."""
    params = random_params({"prompt": (4, 8), "W": (8, 8), "head": (8, 3)})

    def model(params: Any, x: jax.Array) -> jax.Array:
        h = jnp.concatenate([params["prompt"], x])
        return jnp.tanh(h @ params["W"]) @ params["head"]

    assert lora_jax.infer_axes(model, params, jnp.ones((5, 8))).linear == ("W",)


def with_statistics(params: Any, x: jax.Array) -> Any:
    """Batch normalisation: what it returns beside the logits depends on one layer alone."""
    h = x @ params["W1"]
    mean = h.mean(0)
    return jnp.tanh(jnp.tanh(h - mean[None]) @ params["W2"]) @ params["head"], {"mean": mean}


def with_a_cache(params: Any, x: jax.Array) -> Any:
    """Attention that returns its keys for the next call."""
    keys = x @ params["W1"]
    h = jnp.tanh((x @ params["W2"]) @ keys.T) @ keys
    return h @ params["head"], {"keys": keys}


@jax.jit
def _jitted(kernel: jax.Array, x: jax.Array) -> jax.Array:
    return x @ kernel


def through_one_jitted_layer(params: Any, x: jax.Array) -> jax.Array:
    return _jitted(
        params["head"], jnp.tanh(_jitted(params["W2"], jnp.tanh(_jitted(params["W1"], x))))
    )


@pytest.mark.parametrize("model", [with_statistics, with_a_cache, through_one_jitted_layer])
def test_only_the_head_is_the_head(model: Any) -> None:
    """Other outputs, and functions that other layers share with the head, don't make heads."""
    params = random_params({"W1": (8, 8), "W2": (8, 8), "head": (8, 8)})
    assert set(lora_jax.infer_axes(model, params, jnp.ones((5, 8))).linear) == {"W1", "W2"}
