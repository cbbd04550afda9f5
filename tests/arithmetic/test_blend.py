"""`blend` against the formulas in NumPy, in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.arithmetic import _recipes
from tests.agreement import assert_agree
from tests.serving.models import CONVOLUTION, DENSE, HEADS, SCANNED, Model
from tests.trained import as_if_trained

WEIGHTS = (0.7, -0.4, 1.2)
DENSITY = 0.5
MODELS = (DENSE, HEADS, CONVOLUTION, SCANNED)
# How to bring a weight's axes into the order (matrix, in, out).
MATRICES = {
    ("dense", "W1"): (1, 12, 9),
    ("dense", "W2"): (1, 9, 8),
    ("heads", "W1"): (1, 12, 12),
    ("heads", "W2"): (1, 12, 12),
    ("convolution", "W"): (1, 36, 8),
    ("scanned", "W"): (3, 10, 10),
}


def adapters(model: Model, **options: Any) -> list[Any]:
    return [model.adapter(seed, alpha=1.0 + seed, **options) for seed in range(len(WEIGHTS))]


def factors(model: Model, name: str, wrapped: Any) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns lora_A (matrix, in, r), lora_B (matrix, r, out) and the scale, in float64."""
    node, (batch, inputs, outputs) = wrapped[name], MATRICES[model.name, name]
    lora_A = np.asarray(node.lora_A, np.float64).reshape(batch, inputs, -1)
    lora_B = np.asarray(node.lora_B, np.float64).reshape(batch, -1, outputs)
    return lora_A, lora_B, float(node.scale)


def change(model: Model, name: str, wrapped: Any) -> np.ndarray:
    lora_A, lora_B, scale = factors(model, name, wrapped)
    return scale * lora_A @ lora_B


def exact_sum(model: Model, name: str, wrappeds: list[Any]) -> np.ndarray:
    return sum(w * change(model, name, each) for w, each in zip(WEIGHTS, wrappeds, strict=True))


def cut(matrices: np.ndarray, rank: int) -> np.ndarray:
    U, S, Vt = np.linalg.svd(matrices, full_matrices=False)
    return U[..., :rank] * S[:, None, :rank] @ Vt[:, :rank]


def names(model: Model) -> list[str]:
    return [name for model_name, name in MATRICES if model_name == model.name]


def trimmed(values: np.ndarray, density: float) -> np.ndarray:
    """Returns one task's matrix with its largest values kept."""
    count = round(density * values.size)
    smallest = np.sort(np.abs(values), axis=None)[::-1][count - 1]
    return np.where(np.abs(values) >= smallest, values, 0)


def ties(values: np.ndarray, weights: np.ndarray, density: float) -> np.ndarray:
    """TIES entry by entry, of one matrix for each task."""
    weighted = [w * trimmed(each, density) for w, each in zip(weights, values, strict=True)]
    merged = np.zeros_like(weighted[0])
    for place in np.ndindex(merged.shape):
        task_values = [each[place] for each in weighted]
        sign = np.sign(sum(task_values))
        agreeing = [value for value in task_values if value != 0 and np.sign(value) == sign]
        merged[place] = np.mean(agreeing) if agreeing else 0.0
    return merged


def pruned_sum(values: np.ndarray, weights: np.ndarray, density: float) -> np.ndarray:
    return sum(w * trimmed(each, density) for w, each in zip(weights, values, strict=True))


def by_matrix(merge: Any, values: list[np.ndarray], weights: Any, density: float) -> np.ndarray:
    """Returns the merged stack of matrices, each of which is merged by itself."""
    return np.stack(
        [merge([each[i] for each in values], weights, density) for i in range(len(values[0]))]
    )


REFERENCES = {"ties": ties, "magnitude_prune": pruned_sum}


# --- exact sums --------------------------------------------------------------------------------

KINDS: dict[str, Any] = {
    "equal ranks": adapters,
    "ranks that differ": lambda model: [model.adapter(i, rank=i + 1, alpha=2.0) for i in range(3)],
    "rslora": lambda model: adapters(model, rslora=True),
    "rslora and not": lambda model: [model.adapter(i, rslora=i != 1) for i in range(3)],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_cat_is_the_exact_sum(model: Model, kind: str) -> None:
    wrappeds = KINDS[kind](model)
    combined = lora_jax.arithmetic.blend(wrappeds, WEIGHTS, "cat")
    for name in names(model):
        assert combined[name].rank == sum(each[name].rank for each in wrappeds)
        assert combined[name].base is model.params[name]
        assert float(combined[name].scale) == 1.0
        assert_agree(change(model, name, combined), exact_sum(model, name, wrappeds))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_svd_is_the_best_approximation_of_the_sum(model: Model, kind: str) -> None:
    wrappeds = KINDS[kind](model)
    for rank in (None, 1, 4):
        combined = lora_jax.arithmetic.blend(wrappeds, WEIGHTS, "svd", rank=rank)
        for name in names(model):
            wanted = rank or max(each[name].rank for each in wrappeds)
            assert combined[name].rank == wanted
            assert_agree(
                change(model, name, combined),
                cut(exact_sum(model, name, wrappeds), wanted),
                tolerance=1e-4,
            )


def test_svd_of_a_rank_above_that_of_the_sum_is_filled_up() -> None:
    wrapped = DENSE.adapter(0)
    combined = lora_jax.arithmetic.blend([wrapped], [2.0], "svd", rank=7)
    assert combined["W1"].rank == 7
    assert_agree(change(DENSE, "W1", combined), 2 * change(DENSE, "W1", wrapped))


@pytest.mark.parametrize("method", ["cat", "svd", "linear", "ties_svd", "magnitude_prune"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_scale_is_applied_once(method: Any, rslora: bool) -> None:
    """One adapter with a weight of 1 is itself, whatever its scale was made of."""
    wrapped = DENSE.adapter(0, rank=4, alpha=10.0, rslora=rslora)
    options = {"density": 1.0} if "ties" in method or "prune" in method else {}
    combined = lora_jax.arithmetic.blend([wrapped], [1.0], method, **options)
    for name in ("W1", "W2"):
        assert_agree(change(DENSE, name, combined), change(DENSE, name, wrapped), tolerance=1e-4)
    again = lora_jax.arithmetic.blend([combined], [1.0], method, **options)
    assert_agree(change(DENSE, "W1", again), change(DENSE, "W1", wrapped), tolerance=1e-4)


# --- factors and full changes ------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_linear_has_the_documented_cross_terms(model: Model, rslora: bool) -> None:
    wrappeds = adapters(model, rslora=rslora)
    combined = lora_jax.arithmetic.blend(wrappeds, WEIGHTS, "linear")
    for name in names(model):
        each = [factors(model, name, wrapped) for wrapped in wrappeds]
        shares = [w * scale for w, (_, _, scale) in zip(WEIGHTS, each, strict=True)]
        roots = np.sqrt(np.abs(shares))
        signed = np.sign(shares) * roots
        cross = sum(
            signed[i] * roots[j] * each[i][0] @ each[j][1]
            for i in range(3)
            for j in range(3)
            if i != j
        )
        assert_agree(
            change(model, name, combined),
            exact_sum(model, name, wrappeds) + cross,
            tolerance=1e-4,
        )


@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_pruned_factors(model: Model, method: Any) -> None:
    wrappeds = adapters(model)
    combined = lora_jax.arithmetic.blend(wrappeds, WEIGHTS, method, density=DENSITY)
    for name in names(model):
        each = [factors(model, name, wrapped) for wrapped in wrappeds]
        shares = np.array([w * scale for w, (_, _, scale) in zip(WEIGHTS, each, strict=True)])
        roots = np.sqrt(np.abs(shares))
        merge = REFERENCES[method]
        expected_A = by_matrix(merge, [A for A, _, _ in each], np.sign(shares) * roots, DENSITY)
        expected_B = by_matrix(merge, [B for _, B, _ in each], roots, DENSITY)
        lora_A, lora_B, scale = factors(model, name, combined)
        assert scale == 1
        assert_agree(lora_A, expected_A)
        assert_agree(lora_B, expected_B)


@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_pruned_changes(model: Model, method: str) -> None:
    wrappeds = [model.adapter(i, rank=i + 1, alpha=2.0, rslora=i == 2) for i in range(3)]
    combined = lora_jax.arithmetic.blend(
        wrappeds, WEIGHTS, f"{method}_svd", density=DENSITY, rank=5
    )
    for name in names(model):
        changes = [change(model, name, wrapped) for wrapped in wrappeds]
        merged = by_matrix(REFERENCES[method], changes, WEIGHTS, DENSITY)
        assert_agree(change(model, name, combined), cut(merged, 5), tolerance=0.001)


def test_ties_of_changes_does_not_depend_on_the_factors() -> None:
    """A and -A with B and -B are one adapter, which entries of factors don't know."""
    wrappeds = adapters(DENSE)
    flipped = [
        jax.tree.map(
            lambda label, leaf: -leaf if label != "frozen" else leaf,
            lora_jax.labels(wrappeds[0]),
            wrappeds[0],
        ),
        *wrappeds[1:],
    ]
    for method, same in (("ties_svd", True), ("ties", False)):
        results = [
            change(DENSE, "W1", lora_jax.arithmetic.blend(each, WEIGHTS, method, density=DENSITY))
            for each in (wrappeds, flipped)
        ]
        if same:
            assert_agree(*results, tolerance=1e-4)
        else:
            assert np.linalg.norm(results[0] - results[1]) > 1e-2


# --- the rules for arrays ----------------------------------------------------------------------


def values(*tasks: list[float]) -> jax.Array:
    """Returns one row for each task, as stacks of a single matrix."""
    return jnp.array(tasks)[:, None, None, :]


def test_the_example_of_the_ties_paper() -> None:
    # Yadav et al. 2023, figure 1: trim, elect, and average what agrees.
    tasks = values([3.0, -2.0, 1.0, 0.0], [-1.0, -4.0, 2.0, 0.0], [2.0, 5.0, -1.0, 0.0])
    merged = _recipes.agreeing_mean(tasks, "total")[0, 0]
    assert_agree(merged, np.array([2.5, -3.0, 1.5, 0.0]))
    merged = _recipes.agreeing_mean(values([5.0], [-1.0], [-2.0]), "frequency")
    assert_agree(merged, np.array([[[-1.5]]]))


def test_even_votes_elect_no_sign() -> None:
    for majority_sign in ("total", "frequency"):
        assert _recipes.agreeing_mean(values([1.0], [-1.0]), majority_sign).tolist() == [[[0.0]]]


def test_what_is_subtracted_votes_as_such() -> None:
    negated = _recipes.RECIPES["ties"].merged(
        values([1.0, 2.0], [3.0, -4.0]),
        jnp.array([1.0, -1.0]),
        density=1.0,
        majority_sign="total",
        key=jax.random.key(0),
    )
    expected = _recipes.agreeing_mean(values([1.0, 2.0], [-3.0, 4.0]), "total")
    assert_agree(negated, expected)


@pytest.mark.parametrize(("density", "kept"), [(1.0, 8), (0.5, 4), (0.3, 2), (0.01, 1)])
def test_the_largest_are_kept_and_equal_ones_no_more_often(density: float, kept: int) -> None:
    tasks = values([1.0, -8.0, 3.0, 4.0, -5.0, 6.0, 7.0, 2.0], [1.0] * 8)
    result = np.asarray(_recipes.largest_kept(tasks, density))[:, 0, 0]
    assert (result != 0).sum(axis=1).tolist() == [kept, kept]
    order = np.argsort(-np.abs(np.asarray(tasks)[0, 0, 0]))[:kept]
    assert set(np.flatnonzero(result[0])) == set(order)


def test_dare_keeps_the_expectation() -> None:
    ones = jnp.ones((2, 1, 300, 300))
    dropped = np.asarray(_recipes.randomly_kept(ones, 0.25, jax.random.key(0)))
    assert set(np.unique(dropped)) == {0.0, 4.0}
    np.testing.assert_allclose(dropped.mean(axis=(1, 2, 3)), 1.0, atol=0.02)
    assert np.any(dropped[0] != dropped[1])


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dare_draws_from_the_key(method: Any) -> None:
    wrappeds = adapters(HEADS)

    def combined(seed: int, density: float) -> np.ndarray:
        tree = lora_jax.arithmetic.blend(
            wrappeds, WEIGHTS, method, density=density, key=jax.random.key(seed)
        )
        return change(HEADS, "W1", tree)

    np.testing.assert_array_equal(combined(0, 0.5), combined(0, 0.5))
    assert np.any(combined(0, 0.5) != combined(1, 0.5))
    # Nothing is dropped at a density of 1.
    plain = {"dare_linear": "linear", "dare_ties": "ties", "dare_ties_svd": "ties_svd"}.get(
        method, "svd"
    )
    options = {"density": 1.0} if "ties" in plain else {}
    expected = lora_jax.arithmetic.blend(wrappeds, WEIGHTS, plain, **options)
    assert_agree(combined(0, 1.0), change(HEADS, "W1", expected), tolerance=1e-4)


def test_each_weight_and_each_layer_draws_its_own() -> None:
    ones = {
        name: jax.tree.map(jnp.ones_like, leaf) for name, leaf in SCANNED.adapter(0, rank=4).items()
    }
    combined = lora_jax.arithmetic.blend([ones], [1.0], "dare_linear", density=0.5)
    layers = np.asarray(combined["W"].lora_A)
    assert np.any(layers[0] != layers[1])


# --- what comes out ----------------------------------------------------------------------------


def test_the_result_is_an_ordinary_adapter() -> None:
    combined = lora_jax.arithmetic.blend(adapters(DENSE, freeze="lora_A"), WEIGHTS, "linear")
    assert jax.tree.structure(combined) == jax.tree.structure(DENSE.adapter(0))
    assert combined["W1"].frozen == ()
    grown = lora_jax.serving.bank([combined, DENSE.adapter(1)])
    assert lora_jax.serving.ids(grown) == (0, 1)


def test_weights_may_be_traced() -> None:
    wrappeds = adapters(DENSE)
    combine = jax.jit(lambda weights: lora_jax.arithmetic.blend(wrappeds, weights, "linear"))
    expected = lora_jax.arithmetic.blend(wrappeds, WEIGHTS, "linear")
    assert_agree(combine(jnp.array(WEIGHTS))["W1"].lora_A, expected["W1"].lora_A)


def test_changed_bases_are_brought_back_first() -> None:
    wrappeds = [DENSE.adapter(0, init="pissa"), DENSE.adapter(1)]
    combined = lora_jax.arithmetic.blend(wrappeds, [1.0, 1.0], "cat")
    assert combined["W1"].base is DENSE.params["W1"]
    expected = sum(
        np.asarray(lora_jax.merge(each)["W1"], np.float64) - np.asarray(DENSE.params["W1"])
        for each in wrappeds
    )
    assert_agree(change(DENSE, "W1", combined)[0], expected, tolerance=1e-4)


def test_adapters_of_some_layers() -> None:
    wrappeds = [SCANNED.adapter(0, layers=(0,)), SCANNED.adapter(1, layers=(2,))]
    combined = lora_jax.arithmetic.blend(wrappeds, [1.0, 0.5], "cat")
    assert combined["W"].layers == (0, 2)
    merged = lora_jax.merge(combined)["W"]
    assert_agree(merged[0], lora_jax.merge(wrappeds[0])["W"][0])
    np.testing.assert_array_equal(merged[1], SCANNED.params["W"][1])


def test_half_precision_factors_are_combined_in_float32() -> None:
    params = {"W": jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.bfloat16)}
    wrapped = lora_jax.wrap(params, "W", rank=2, dtype=jnp.bfloat16)
    wrappeds = [as_if_trained(wrapped, seed) for seed in range(2)]
    combined = lora_jax.arithmetic.blend(wrappeds, [0.3, 0.3], "linear")
    assert combined["W"].lora_A.dtype == jnp.bfloat16
    exact = 0.3**0.5 * sum(np.asarray(each["W"].lora_A, np.float64) for each in wrappeds)
    assert_agree(combined["W"].lora_A, exact, tolerance=2**-8)


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mean"}, "`method` is 'mean'; expected one of 'cat', 'svd'"),
        ({"method": "ties"}, r"`density` is None; the method 'ties' needs .*density=0.5"),
        ({"method": "dare_linear", "density": 0.0}, "`density` is 0.0"),
        ({"method": "ties_svd", "density": 1.5}, "`density` is 1.5"),
        ({"method": "cat", "density": 0.5}, "method 'cat' prunes nothing"),
        ({"method": "linear", "density": 0.5}, "method 'linear' prunes nothing"),
        ({"method": "cat", "rank": 2}, "the method 'cat' takes no rank"),
        ({"method": "svd", "rank": 9}, "`rank` is 9 for 'W2' .*at most 8"),
        ({"method": "svd", "rank": 0}, "`rank` is 0"),
        (
            {"method": "ties", "density": 0.5, "majority_sign": "mean"},
            "`majority_sign` is 'mean'; expected one of 'total', 'frequency'",
        ),
        ({"method": "cat", "weights": [1.0]}, r"`weights` has the shape \(1,\)"),
        ({"method": "cat", "weights": [1.0, 2.0, np.inf]}, "expected finite numbers"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    arguments = {"weights": WEIGHTS, **options}
    with pytest.raises(ValueError, match=message):
        lora_jax.arithmetic.blend(adapters(DENSE), **arguments)


def test_ranks_that_differ_have_no_entry_by_entry() -> None:
    wrappeds = [DENSE.adapter(0, rank=1), DENSE.adapter(1, rank=2)]
    with pytest.raises(ValueError, match=r"ranks \[1, 2\] at 'W1'; .*resize"):
        lora_jax.arithmetic.blend(wrappeds, [1.0, 1.0], "linear")


@pytest.mark.wrong_types
def test_adapters_that_do_not_belong_together() -> None:
    with pytest.raises(ValueError, match="a different structure"):
        lora_jax.arithmetic.blend([DENSE.adapter(0), HEADS.adapter(0)], [1.0, 1.0])
    with pytest.raises(ValueError, match=r"`adapters\[0\]` has a magnitude \(DoRA\) at 'W1'"):
        lora_jax.arithmetic.blend([DENSE.adapter(0, dora=True)], [1.0])
    with pytest.raises(TypeError, match="`adapters` is a dict"):
        lora_jax.arithmetic.blend(DENSE.adapter(0), [1.0])
