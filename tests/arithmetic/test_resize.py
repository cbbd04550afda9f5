"""`resize`: growing changes nothing, pruning keeps the best approximation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.agreement import assert_agree
from tests.arrays import random
from tests.trained import as_if_trained

AXES = {
    "dense": ("in", "out"),
    "heads": ("in", "out", "out"),
    "stack": ("batch", "in", "out"),
    "mixed": ("out", "batch", "in", "in"),
}
SHAPES = {"dense": (7, 6), "heads": (7, 2, 4), "stack": (3, 7, 6), "mixed": (6, 3, 2, 4)}


def params() -> dict[str, jax.Array]:
    return {name: random(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}


def trained(**options: Any) -> Any:
    return as_if_trained(lora_jax.wrap(params(), ".*", axes=AXES, alpha=3.0, **options))


def changes(wrapped: Any) -> dict[str, np.ndarray]:
    """Returns each weight's change as matrices (batch, in, out), in float64."""
    merged = lora_jax.merge(wrapped)
    order = {"dense": (0, 1), "heads": (0, 1, 2), "stack": (0, 1, 2), "mixed": (1, 2, 3, 0)}
    shape = {"dense": (1, 7, 6), "heads": (1, 7, 8), "stack": (3, 7, 6), "mixed": (3, 8, 6)}
    return {
        name: np.asarray(merged[name] - lora_jax.unwrap(wrapped)[name], np.float64)
        .transpose(order[name])
        .reshape(shape[name])
        for name in SHAPES
    }


@pytest.mark.parametrize("options", [{}, {"init": "pissa"}, {"dora": True}], ids=str)
def test_growing_changes_nothing_and_can_train(options: dict[str, Any]) -> None:
    wrapped = trained(rank=2, **options)
    grown = lora_jax.arithmetic.resize(wrapped, 5)
    for name in SHAPES:
        assert grown[name].rank == 5
        assert_agree(lora_jax.merge(grown)[name], lora_jax.merge(wrapped)[name])
        assert grown[name].scale is wrapped[name].scale
        # Both zero would have no gradient at all.
        new_columns = np.asarray(grown[name].lora_A)[..., 2:]
        assert np.all(np.abs(new_columns).sum(axis=tuple(range(new_columns.ndim - 1))) > 0)


def test_new_columns_differ_between_weights_layers_and_keys() -> None:
    wrapped = trained(rank=2)
    first = lora_jax.arithmetic.resize(wrapped, 3, key=jax.random.key(1))
    second = lora_jax.arithmetic.resize(wrapped, 3, key=jax.random.key(2))
    columns = [
        np.asarray(each)
        for each in (
            first["dense"].lora_A[:, 2],
            second["dense"].lora_A[:, 2],
            first["stack"].lora_A[0, :, 2],
            first["stack"].lora_A[1, :, 2],
            first["heads"].lora_A[:, 2],
        )
    ]
    assert len({column.tobytes() for column in columns}) == len(columns)


@pytest.mark.parametrize("options", [{}, {"init": "pissa"}], ids=str)
@pytest.mark.parametrize("rank", [1, 3])
def test_pruning_keeps_the_best_approximation(rank: int, options: dict[str, Any]) -> None:
    wrapped = trained(rank=4, **options)
    pruned = lora_jax.arithmetic.resize(wrapped, rank)
    for name, change in changes(wrapped).items():
        U, S, Vt = np.linalg.svd(change, full_matrices=False)
        best = (U[..., :rank] * S[:, None, :rank]) @ Vt[:, :rank]
        assert pruned[name].rank == rank
        assert_agree(changes(pruned)[name], best, tolerance=1e-4)


def test_pruning_what_was_grown_gives_the_same_model() -> None:
    wrapped = trained(rank=2)
    back = lora_jax.arithmetic.resize(lora_jax.arithmetic.resize(wrapped, 5), 2)
    for name in SHAPES:
        assert_agree(lora_jax.merge(back)[name], lora_jax.merge(wrapped)[name])


@pytest.mark.parametrize("rank", [1, 4])
def test_only_chosen_layers(rank: int) -> None:
    wrapped = as_if_trained(
        lora_jax.wrap(params(), "stack", axes=AXES, rank=2, layers=(0, 2), dora=True)
    )
    resized = lora_jax.arithmetic.resize(wrapped, rank)["stack"]
    assert (resized.lora_A.shape, resized.layers) == ((2, 7, rank), (0, 2))


def test_a_mapping_names_adapters() -> None:
    wrapped = trained(rank=2)
    resized = lora_jax.arithmetic.resize(wrapped, {"dense|heads": 3, "heads": 5})
    ranks = {name: resized[name].rank for name in SHAPES}
    assert ranks == {"dense": 3, "heads": 3, "stack": 2, "mixed": 2}
    assert resized["stack"] is wrapped["stack"]


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("rank", "error", "message"),
    [
        (0, ValueError, "`rank` is 0"),
        (2.0, TypeError, "`rank` is 2.0"),
        ({"dense": True}, TypeError, "`rank` of 'dense' is True"),
        ({"dnse": 2}, ValueError, "`rank` has 'dnse', which matches no adapter.*dense"),
        (7, ValueError, r"`rank` is 7 for 'dense'.*at most 6.*resize"),
    ],
)
def test_refuses(rank: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lora_jax.arithmetic.resize(trained(rank=2), rank)


def test_plain_params_raise() -> None:
    with pytest.raises(ValueError, match="`wrapped` has no adapters"):
        lora_jax.arithmetic.resize(params(), 2)


def test_a_resized_adapter_keeps_its_scale_under_rslora() -> None:
    """Neither the rank nor its root comes in a second time."""
    wrapped = trained(rank=4, rslora=True)
    for rank in (2, 6):
        assert float(lora_jax.arithmetic.resize(wrapped, rank)["dense"].scale) == 1.5
    assert_agree(
        lora_jax.merge(lora_jax.arithmetic.resize(wrapped, 6))["dense"],
        jnp.asarray(lora_jax.merge(wrapped)["dense"]),
    )


def rank_of(matrix: Any) -> int:
    return int(np.linalg.matrix_rank(np.asarray(matrix, np.float64), tol=1e-5))


def test_new_columns_are_new() -> None:
    """Also where as many are added as there were, and where the same number is added twice."""
    wrapped = lora_jax.wrap({"kernel": random(32, 24)}, "kernel", rank=4)
    twice = lora_jax.arithmetic.resize(lora_jax.arithmetic.resize(wrapped, 8), 12)
    assert rank_of(twice["kernel"].lora_A) == 12


@pytest.mark.parametrize("options", [{}, {"init": "pissa"}], ids=str)
def test_an_adapter_that_is_pruned_before_it_changed_can_train(options: dict[str, Any]) -> None:
    wrapped = lora_jax.wrap({"kernel": random(16, 12)}, "kernel", rank=4, **options)
    pruned = lora_jax.arithmetic.resize(wrapped, 2)
    assert_agree(lora_jax.merge(pruned)["kernel"], lora_jax.unwrap(wrapped)["kernel"])
    assert np.all(np.any(np.asarray(pruned["kernel"].lora_A), axis=0))


def test_what_is_frozen_stays_frozen() -> None:
    wrapped = lora_jax.wrap(
        {"kernel": random(16, 12)},
        "kernel",
        rank=4,
        init="pissa",
        dora=True,
        freeze=("lora_A", "magnitude"),
    )
    assert lora_jax.arithmetic.resize(wrapped, 2)["kernel"].frozen == ("lora_A", "magnitude")
    assert lora_jax.arithmetic.on_original_base(wrapped)["kernel"].frozen == ("lora_A", "magnitude")


def test_rows_that_would_never_train_are_refused() -> None:
    wrapped = lora_jax.wrap({"kernel": random(16, 12)}, "kernel", rank=2, init="mica")
    with pytest.raises(ValueError, match="whose lora_B is frozen"):
        lora_jax.arithmetic.resize(wrapped, 3)


def test_bfloat16_factors_are_pruned() -> None:
    wrapped = lora_jax.wrap({"kernel": random(16, 12)}, "kernel", rank=4, dtype=jnp.bfloat16)
    assert lora_jax.arithmetic.resize(wrapped, 2)["kernel"].lora_A.dtype == jnp.bfloat16


# --- stacks of adapters --------------------------------------------------------------------------

BANKS: dict[str, dict[str, Any]] = {
    "lora": {},
    "pissa": {"init": "pissa"},
    "dora": {"dora": True},
    "some layers": {"layers": [1]},
}


@pytest.fixture(scope="module", params=BANKS)
def bank(request: pytest.FixtureRequest) -> Any:
    """Two adapters of different ranks, and a place that is empty."""
    options = BANKS[request.param]
    names = "stack|mixed" if "layers" in options else ".*"
    tree = {name: leaf for name, leaf in params().items() if name in names or names == ".*"}
    axes = {name: AXES[name] for name in tree}
    adapters = [
        as_if_trained(
            lora_jax.wrap(
                tree, ".*", rank=rank, alpha=3.0, key=jax.random.key(rank), axes=axes, **options
            )
        )
        for rank in (2, 3)
    ]
    return lora_jax.serving.bank(adapters, capacity=3)


@pytest.mark.parametrize("rank", [1, 2, 5])
class TestStack:
    def test_each_adapter_is_resized_by_itself(self, bank: Any, rank: int) -> None:
        resized = lora_jax.arithmetic.resize(bank, rank)
        for adapter_id in (0, 1):
            alone = lora_jax.arithmetic.resize(lora_jax.serving.select(bank, adapter_id), rank)
            one = lora_jax.serving.select(resized, adapter_id)
            assert_agree(lora_jax.merge(one), lora_jax.merge(alone))
            for node, expected in zip(nodes(one), nodes(alone), strict=True):
                assert node.lora_A.shape == expected.lora_A.shape
                assert node.lora_B.shape == expected.lora_B.shape

    def test_the_bank_stays_one(self, bank: Any, rank: int) -> None:
        resized = lora_jax.arithmetic.resize(bank, rank)
        assert lora_jax.serving.ids(resized) == (0, 1)
        base = lora_jax.unwrap(resized)
        assert_agree(lora_jax.merge(lora_jax.serving.select(resized, -1)), base)
        added = lora_jax.serving.add(resized, lora_jax.serving.select(resized, 1))
        assert lora_jax.serving.ids(added) == (0, 1, 2)

    def test_a_batch_over_it(self, bank: Any, rank: int) -> None:
        """A bank knows the norms of its adapters, which change with the factors."""
        resized = lora_jax.arithmetic.resize(bank, rank)

        def fn(tree: Any, x: Any) -> Any:
            return jnp.einsum("ncd,obcd->nob", x, tree["mixed"])

        x = random(2, 2, 4, seed=9)
        together = jax.jit(lora_jax.serving.adapt(fn))(resized, jnp.arange(2), x)
        one_by_one = [
            fn(lora_jax.merge(lora_jax.serving.select(resized, i)), x[i][None])[0] for i in (0, 1)
        ]
        assert_agree(together, jnp.stack(one_by_one))


def nodes(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, lora_jax.LoRAWeight))
