"""Initialisers: their distributions, and what one of the user's own may do."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax._shapes import to_matrices
from tests.agreement import assert_agree
from tests.arrays import random

KEY = jax.random.key(3)

# More inputs than outputs, and fewer; then axes in another order, and several for each role.
SHAPES = [
    ((12, 10), ("in", "out")),
    ((10, 12), ("in", "out")),
    ((10, 3, 12), ("out", "batch", "in")),
    ((2, 6, 3, 2, 5, 2), ("batch", "in", "batch", "in", "out", "out")),
]


def wrapped_kernel(shape: tuple[int, ...], **options: Any) -> lora_jax.LoRAWeight:
    params = {"kernel": random(*shape)}
    return lora_jax.wrap(params, "kernel", key=KEY, **options)["kernel"]


@pytest.mark.parametrize(
    ("shape", "axes", "inputs"),
    [
        ((400, 90), ("in", "out"), 400),
        ((90, 400), ("out", "in"), 400),
        ((20, 30, 90), ("in", "in", "out"), 600),
        ((3, 200, 90), ("batch", "in", "out"), 200),
    ],
)
def test_the_default_is_uniform_within_one_over_root_in(
    shape: tuple[int, ...], axes: tuple[str, ...], inputs: int
) -> None:
    weight = wrapped_kernel(shape, rank=16, axes={"kernel": axes})
    bound = inputs**-0.5
    scaled = np.asarray(weight.lora_A).ravel() / bound
    assert np.abs(scaled).max() <= 1
    # A uniform distribution has this deviation, and comes near its bounds on both sides.
    assert np.std(scaled) == pytest.approx(3**-0.5, rel=0.03)
    assert scaled.min() < -0.99
    assert scaled.max() > 0.99
    assert not np.any(np.asarray(weight.lora_B))


@pytest.mark.parametrize(("sigma", "expected"), [(None, 1 / 8), (1.0, 1.0), (0.02, 0.02)])
def test_gaussian(sigma: float | None, expected: float) -> None:
    init = functools.partial(lora_jax.init.gaussian, standard_deviation=sigma)
    weight = wrapped_kernel((500, 40), rank=8, init=init)
    assert np.std(np.asarray(weight.lora_A)) == pytest.approx(expected, rel=0.05)
    assert np.abs(np.mean(np.asarray(weight.lora_A))) < 0.1 * expected
    assert not np.any(np.asarray(weight.lora_B))


@pytest.mark.parametrize("name", ["gaussian", "kaiming", "mica", "olora", "orthogonal", "pissa"])
def test_a_name_is_the_function(name: str) -> None:
    by_name = wrapped_kernel((20, 10), init=name)
    by_function = wrapped_kernel((20, 10), init=getattr(lora_jax.init, name))
    np.testing.assert_array_equal(by_name.lora_A, by_function.lora_A)
    assert lora_jax.init.initializer(name) is getattr(lora_jax.init, name)


def low_rank_part_taken_out(
    key: jax.Array, weight2d: jax.Array, rank: int, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The principal part becomes the adapter, and the base keeps the rest."""
    U, S, Vt = jnp.linalg.svd(weight2d, full_matrices=False)
    root = jnp.sqrt(S[:rank] / scale)
    A, B = U[:, :rank] * root[None], root[:, None] * Vt[:rank]
    return weight2d - scale * (A @ B), A, B


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((12, 10), ("in", "out")),
        ((4, 3, 10), ("in", "in", "out")),
        ((3, 12, 10), ("batch", "in", "out")),
        ((10, 3, 12), ("out", "batch", "in")),
    ],
)
def test_an_initialiser_may_change_the_base(shape: tuple[int, ...], axes: tuple[str, ...]) -> None:
    params = {"kernel": random(*shape), "other": jnp.ones((3, 3))}
    wrapped = lora_jax.wrap(
        params, "kernel", rank=2, alpha=1.0, axes={"kernel": axes}, init=low_rank_part_taken_out
    )
    assert_agree(lora_jax.merge(wrapped)["kernel"], params["kernel"])
    assert jnp.abs(wrapped["kernel"].base - params["kernel"]).max() > 0.1
    assert_agree(lora_jax.unwrap(wrapped)["kernel"], params["kernel"])
    assert wrapped["other"] is params["other"]


def test_an_initialiser_sees_matrix_rank_and_scale() -> None:
    seen = []

    def init(key: jax.Array, weight2d: jax.Array, rank: int, scale: float) -> Any:
        seen.append((weight2d.shape, rank, scale))
        return lora_jax.init.kaiming(key, weight2d, rank, scale)

    wrapped_kernel((4, 5, 6), rank=2, alpha=3, axes={"kernel": ("in", "out", "out")}, init=init)
    assert seen == [((4, 30), 2, 1.5)]


@pytest.mark.wrong_types
@pytest.mark.parametrize("init", ["nope", "", 3, None, []])
def test_an_unknown_name_raises(init: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="`init` is.*'gaussian', 'kaiming'"):
        wrapped_kernel((4, 4), rank=2, init=init)


@pytest.mark.parametrize(
    ("A_shape", "B_shape"), [((2, 8), (2, 6)), ((8, 2), (6, 2)), ((8, 1), (1, 6))]
)
def test_factors_of_another_shape_raise(A_shape: tuple[int, ...], B_shape: tuple[int, ...]) -> None:
    """Transposed factors have as many numbers, so that a reshape would take them for right."""

    def init(key: jax.Array, weight2d: jax.Array, rank: int, scale: float) -> Any:
        return weight2d, jnp.ones(A_shape), jnp.ones(B_shape)

    with pytest.raises(ValueError, match="`init`.*kernel"):
        wrapped_kernel((8, 6), rank=2, init=init)


def gathered_moments(rows: Any) -> lora_jax.init.InputMoments:
    """Returns the moments of `rows`, of shape (batch, n, in)."""
    rows = np.asarray(rows, np.float64)
    return lora_jax.init.InputMoments(
        second=jnp.asarray(np.einsum("bni,bnj->bij", rows, rows), jnp.float32),
        first=jnp.asarray(rows.sum(1), jnp.float32),
        count=jnp.full(rows.shape[0], rows.shape[1]),
    )


def seen_inputs(matrices: Any, count: int = 50) -> np.ndarray:
    """Returns inputs (batch, n, in) with a mean, and a variance of its own along each axis."""
    batch, inputs, _ = matrices.shape
    generator = np.random.default_rng(5)
    deviations = np.linspace(2, 0.1, inputs)
    return 0.5 + generator.normal(size=(batch, count, inputs)) * deviations


def a_gradient(leaf: Any) -> jax.Array:
    return random(*leaf.shape, dtype=leaf.dtype, seed=11)


def from_moments(make: Callable[..., Any], **options: Any) -> Callable[[Any, Any], Any]:
    return lambda leaf, axes: make(
        {"kernel": gathered_moments(seen_inputs(to_matrices(leaf, axes)))}, **options
    )


def from_gradient(**options: Any) -> Callable[[Any, Any], Any]:
    return lambda leaf, axes: lora_jax.init.lora_ga({"kernel": a_gradient(leaf)}, **options)


# Every initialiser, made for a weight and its axes.
INITIALIZERS: dict[str, Callable[[Any, Any], Any]] = {
    "corda ipm": from_moments(lora_jax.init.corda),
    "corda kpm": from_moments(lora_jax.init.corda, mode="kpm"),
    "eva": from_moments(lora_jax.init.eva),
    "eva whitened": from_moments(lora_jax.init.eva, whiten=True),
    "gaussian": lambda leaf, axes: "gaussian",
    "kaiming": lambda leaf, axes: "kaiming",
    "lora_ga": from_gradient(),
    "lora_ga A2rBr": from_gradient(direction="A2rBr", gamma=None),
    "lora_ga ArBr randomised": from_gradient(direction="ArBr", power_iterations=4),
    "mica": lambda leaf, axes: "mica",
    "olora": lambda leaf, axes: "olora",
    "orthogonal": lambda leaf, axes: "orthogonal",
    "pissa": lambda leaf, axes: "pissa",
    "pissa randomised": lambda leaf, axes: functools.partial(
        lora_jax.init.pissa, power_iterations=2
    ),
}
KEEPS_THE_BASE = {"eva", "eva whitened", "gaussian", "kaiming", "mica", "orthogonal"}


def initialised(
    name: str, leaf: jax.Array, axes: tuple[str, ...], rank: int = 3, alpha: float = 1.5
) -> lora_jax.LoRAWeight:
    init = INITIALIZERS[name](leaf, axes)
    return lora_jax.wrap(
        {"kernel": leaf},
        "kernel",
        rank=rank,
        alpha=alpha,
        key=KEY,
        axes={"kernel": axes},
        init=init,
    )["kernel"]


def as_matrices(
    weight: lora_jax.LoRAWeight,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns base (batch, in, out), lora_A (batch, in, r) and lora_B (batch, r, out)."""
    base = np.asarray(to_matrices(weight.base, weight.axes))
    batch, inputs, outputs = base.shape
    return (
        base,
        np.asarray(weight.lora_A).reshape(batch, inputs, weight.rank),
        np.asarray(weight.lora_B).reshape(batch, weight.rank, outputs),
    )


@pytest.mark.parametrize(("shape", "axes"), SHAPES)
@pytest.mark.parametrize("name", INITIALIZERS)
def test_the_model_stays_what_it_was(
    name: str, shape: tuple[int, ...], axes: tuple[str, ...]
) -> None:
    leaf = random(*shape)
    weight = initialised(name, leaf, axes)
    assert_agree(lora_jax.merge(weight), leaf, tolerance=2e-6)
    assert (weight.base is leaf) == (name in KEEPS_THE_BASE)
    if weight.base is leaf:
        np.testing.assert_array_equal(lora_jax.merge(weight), leaf)
    _, A, B = as_matrices(weight)
    assert np.any(A, axis=(1, 2)).all() or np.any(B, axis=(1, 2)).all()


@pytest.mark.parametrize("name", INITIALIZERS)
def test_a_bfloat16_weight_gets_float32_factors(name: str) -> None:
    leaf = random(3, 12, 10, dtype=jnp.bfloat16)
    weight = initialised(name, leaf, ("batch", "in", "out"))
    assert (weight.base.dtype, weight.lora_A.dtype) == (jnp.bfloat16, jnp.float32)
    assert_agree(lora_jax.merge(weight), leaf, tolerance=float(jnp.finfo(jnp.bfloat16).eps))


def rank_one(inputs: int, outputs: int) -> jax.Array:
    return jnp.outer(jnp.linspace(-1, 2, inputs), jnp.linspace(-2, 1, outputs))


DEGENERATE_WEIGHTS = {
    "zero": jnp.zeros((12, 10)),
    "equal entries": jnp.ones((12, 10)),
    "equal singular values": jnp.eye(12, 10),
    "rank one": rank_one(12, 10),
    "tiny": 1e-18 * rank_one(12, 10),
    "huge": 1e15 * rank_one(12, 10),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", INITIALIZERS)
def test_degenerate_weights_give_finite_factors(name: str, transposed: bool) -> None:
    stack = jnp.stack(list(DEGENERATE_WEIGHTS.values()))
    axes = ("batch", "out", "in") if transposed else ("batch", "in", "out")
    weight = initialised(name, stack, axes, rank=5)
    assert all(jnp.isfinite(array).all() for array in jax.tree.leaves(weight))
    for merged, leaf in zip(lora_jax.merge(weight), stack, strict=True):
        # LoRA-GA takes its factors from the gradient, whatever the size of the weight.
        assert_agree(merged, leaf, size=np.linalg.norm(leaf) + leaf.size**0.5, tolerance=1e-6)


DEGENERATE_INPUTS = {
    "none": np.zeros((0, 6)),
    "zero": np.zeros((4, 6)),
    "all equal": np.ones((4, 6)),
    "two tiny ones": 1e-12 * np.eye(6)[:2],
}


@pytest.mark.parametrize(
    "make",
    [
        lora_jax.init.eva,
        functools.partial(lora_jax.init.eva, whiten=True),
        lora_jax.init.corda,
        functools.partial(lora_jax.init.corda, mode="kpm"),
    ],
)
def test_degenerate_inputs_give_finite_factors(make: Callable[..., Any]) -> None:
    gathered = [gathered_moments(rows[None]) for rows in DEGENERATE_INPUTS.values()]
    moments = jax.tree.map(lambda *parts: jnp.concatenate(parts), *gathered)
    params = {"kernel": random(len(gathered), 6, 5)}
    axes = {"kernel": ("batch", "in", "out")}
    wrapped = lora_jax.wrap(params, "kernel", rank=3, axes=axes, init=make({"kernel": moments}))
    assert all(jnp.isfinite(array).all() for array in jax.tree.leaves(wrapped))
    assert_agree(lora_jax.merge(wrapped)["kernel"], params["kernel"])


def test_a_zero_gradient_gives_finite_factors() -> None:
    params = {"kernel": jnp.ones((6, 6))}
    init = lora_jax.init.lora_ga({"kernel": jnp.zeros((6, 6))})
    wrapped = lora_jax.wrap(params, "kernel", rank=3, init=init)
    assert all(jnp.isfinite(array).all() for array in jax.tree.leaves(wrapped))


# What each decomposition is by its definition: W, rank, scale and inputs to A, B. Signs are free.
def pissa_by_definition(
    W: np.ndarray, rank: int, scale: float, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    root = np.diag(np.sqrt(S[:rank] / scale))
    return U[:, :rank] @ root, root @ Vt[:rank]


def olora_by_definition(
    W: np.ndarray, rank: int, scale: float, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    Q, R = np.linalg.qr(W.T)
    return R[:rank].T, Q[:, :rank].T


def corda_by_definition(
    W: np.ndarray, rank: int, scale: float, rows: np.ndarray, chosen: slice
) -> tuple[np.ndarray, np.ndarray]:
    C = rows.T @ rows
    C = C / np.mean(np.diag(C)) + 0.01 * np.eye(len(C))
    U, S, Vt = np.linalg.svd(W.T @ C, full_matrices=False)
    root = np.diag(np.sqrt(S[chosen] / scale))
    return np.linalg.inv(C) @ Vt[chosen].T @ root, root @ U[:, chosen].T


DEFINITIONS: dict[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {
    "corda ipm": functools.partial(corda_by_definition, chosen=slice(None, 3)),
    "corda kpm": functools.partial(corda_by_definition, chosen=slice(-3, None)),
    "olora": olora_by_definition,
    "pissa": pissa_by_definition,
}


@pytest.mark.parametrize(("shape", "axes"), SHAPES)
@pytest.mark.parametrize("name", DEFINITIONS)
def test_decompositions_are_those_of_their_definition(
    name: str, shape: tuple[int, ...], axes: tuple[str, ...]
) -> None:
    leaf = random(*shape)
    weight = initialised(name, leaf, axes)
    matrices = np.asarray(to_matrices(leaf, axes), np.float64)
    for W, rows, base, A, B in zip(
        matrices, seen_inputs(matrices), *as_matrices(weight), strict=True
    ):
        expected_A, expected_B = DEFINITIONS[name](W, 3, 0.5, rows)
        assert_agree(A @ B, expected_A @ expected_B, tolerance=2e-4)
        assert_agree(abs(A), abs(expected_A), tolerance=5e-4)
        assert_agree(abs(B), abs(expected_B), tolerance=5e-4)
        assert_agree(base, W - 0.5 * expected_A @ expected_B, tolerance=2e-4)


@pytest.mark.parametrize("decay", [0.5, 0.8])
@pytest.mark.parametrize("shape", [(80, 50), (50, 80)])
def test_the_randomised_decomposition_is_close_where_the_spectrum_decays(
    shape: tuple[int, int], decay: float
) -> None:
    U, V = (np.linalg.qr(np.random.default_rng(side).normal(size=(side, 50)))[0] for side in shape)
    leaf = jnp.asarray(U * decay ** np.arange(50) @ V.T, jnp.float32)
    exact, fast = (
        lora_jax.wrap({"kernel": leaf}, "kernel", rank=8, init=init)["kernel"]
        for init in ("pissa", functools.partial(lora_jax.init.pissa, power_iterations=4))
    )
    assert_agree(fast.base, exact.base, size=leaf)
    assert_agree(abs(fast.lora_A), abs(exact.lora_A), tolerance=1e-4)


def test_power_iterations_and_oversampling_sharpen_the_randomised_decomposition() -> None:
    leaf = random(80, 60)

    def distance(init: Any) -> float:
        wrapped = lora_jax.wrap({"kernel": leaf}, "kernel", rank=8, init=init)
        return float(jnp.linalg.norm(wrapped["kernel"].base))

    def randomised(**options: int) -> float:
        return distance(functools.partial(lora_jax.init.pissa, **options))

    best = distance("pissa")
    none, some, many = (randomised(power_iterations=count) for count in (0, 2, 10))
    assert best <= many < some < none < randomised(power_iterations=0, oversampling=0)
    assert many == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("option", ["power_iterations", "oversampling"])
def test_negative_options_of_the_randomised_decomposition_raise(option: str) -> None:
    options = {"power_iterations": 2, "oversampling": 2, option: -1}
    with pytest.raises(ValueError, match=f"`{option}` is -1"):
        wrapped_kernel((4, 4), rank=2, init=functools.partial(lora_jax.init.pissa, **options))


@pytest.mark.parametrize(("shape", "axes"), SHAPES)
def test_orthogonal_columns_are_orthonormal(shape: tuple[int, ...], axes: tuple[str, ...]) -> None:
    _, A, B = as_matrices(initialised("orthogonal", jnp.ones(shape), axes))
    assert_agree(A.mT @ A, np.broadcast_to(np.eye(3), (len(A), 3, 3)))
    assert not B.any()
    if len(A) > 1:
        assert abs(A[0] - A[1]).max() > 0.1


@pytest.mark.parametrize(("shape", "axes"), SHAPES)
def test_mica_takes_the_outputs_that_the_weight_hardly_writes_to(
    shape: tuple[int, ...], axes: tuple[str, ...]
) -> None:
    leaf = random(*shape)
    _, A, B = as_matrices(initialised("mica", leaf, axes))
    assert not A.any()
    for W, minor in zip(np.asarray(to_matrices(leaf, axes), np.float64), B, strict=True):
        # Torch's weight is the transpose, and its left vectors are the outputs.
        U, S, _ = np.linalg.svd(W.T, full_matrices=False)
        assert_agree(abs(minor), abs(U[:, -3:].T), tolerance=1e-4)
        assert_agree(np.linalg.norm(W @ minor.T, axis=0), S[-3:])


def test_mica_says_that_lora_b_does_not_train() -> None:
    weight = random(6, 5)
    base, lora_A, lora_B = lora_jax.init.mica(KEY, weight, 2, 1.0)
    assert base is weight
    assert isinstance(lora_B, lora_jax.init.Frozen)
    assert not isinstance(lora_A, lora_jax.init.Frozen)
    assert [leaf.shape for leaf in jax.tree.leaves(lora_B)] == [(2, 5)]


@pytest.mark.parametrize(("shape", "axes"), SHAPES)
@pytest.mark.parametrize("centred", [True, False])
def test_eva_takes_the_principal_components_of_the_inputs(
    centred: bool, shape: tuple[int, ...], axes: tuple[str, ...]
) -> None:
    leaf = random(*shape)
    seen = seen_inputs(to_matrices(leaf, axes))
    init = lora_jax.init.eva({"kernel": gathered_moments(seen)}, centred=centred)
    weight = lora_jax.wrap({"kernel": leaf}, "kernel", rank=3, axes={"kernel": axes}, init=init)[
        "kernel"
    ]
    _, A, B = as_matrices(weight)
    assert not B.any()
    for rows, columns in zip(seen, A, strict=True):
        _, _, Vt = np.linalg.svd(rows - rows.mean(0) if centred else rows, full_matrices=False)
        assert_agree(abs(columns), abs(Vt[:3].T), tolerance=1e-4)
        assert (columns[abs(columns).argmax(0), range(3)] > 0).all()


def test_whitened_components_give_a_variance_of_one() -> None:
    rows = seen_inputs(np.empty((1, 12, 10)))
    leaf = jnp.ones((12, 10))
    init = lora_jax.init.eva({"kernel": gathered_moments(rows)}, whiten=True)
    lora_A = lora_jax.wrap({"kernel": leaf}, "kernel", rank=4, init=init)["kernel"].lora_A
    assert_agree(np.cov((rows[0] @ lora_A).T, bias=True), np.eye(4), tolerance=1e-4)


@pytest.mark.parametrize(("shape", "axes"), SHAPES)
@pytest.mark.parametrize(
    ("direction", "of_A", "of_B", "gamma"),
    [
        ("ArB2r", [0, 1, 2], [3, 4, 5], 16.0),
        ("A2rBr", [3, 4, 5], [0, 1, 2], 4.0),
        ("ArBr", [1, 3, 5], [0, 2, 4], None),
    ],
)
def test_lora_ga_takes_the_singular_vectors_of_the_gradient(
    direction: Any,
    of_A: list[int],
    of_B: list[int],
    gamma: float | None,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
) -> None:
    leaf = random(*shape)
    init = lora_jax.init.lora_ga({"kernel": a_gradient(leaf)}, direction=direction, gamma=gamma)
    weight = lora_jax.wrap(
        {"kernel": leaf}, "kernel", rank=3, alpha=1.5, axes={"kernel": axes}, init=init
    )["kernel"]
    gradients = np.asarray(to_matrices(a_gradient(leaf), axes), np.float64)
    matrices = np.asarray(to_matrices(leaf, axes), np.float64)
    for G, W, base, A, B in zip(gradients, matrices, *as_matrices(weight), strict=True):
        U, _, Vt = np.linalg.svd(G, full_matrices=False)
        size = 1 if gamma is None else (G.shape[1] / gamma**2) ** 0.25
        assert_agree(abs(A), size * abs(U[:, of_A]), tolerance=1e-4)
        assert_agree(abs(B), size * abs(Vt[of_B]), tolerance=1e-4)
        assert_agree(base, W - 0.5 * A @ B)
        for vectors in (A.T, B):
            assert (vectors.max(axis=1) == abs(vectors).max(axis=1)).all()


def test_the_first_step_of_lora_ga_is_the_best_approximation_of_the_gradient() -> None:
    params = {"kernel": random(12, 10)}
    x, y = (random(*shape, seed=seed) for seed, shape in ((1, (20, 12)), (2, (20, 10))))

    def loss(params: Any) -> jax.Array:
        return jnp.mean((x @ params["kernel"] - y) ** 2)

    G = jax.grad(loss)(params)["kernel"]
    init = lora_jax.init.lora_ga({"kernel": G}, gamma=None)
    wrapped = lora_jax.wrap(params, "kernel", rank=2, alpha=2.0, init=init)
    adapters, frozen = lora_jax.split(wrapped)
    gradients = jax.grad(lambda a: lora_jax.adapt(loss)(lora_jax.combine(a, frozen)))(adapters)
    rate = 1e-3
    stepped = jax.tree.map(lambda value, slope: value - rate * slope, adapters, gradients)
    after = lora_jax.merge(lora_jax.combine(stepped, frozen))["kernel"]
    U, S, Vt = np.linalg.svd(np.asarray(G))
    best = U[:, :4] * S[:4] @ Vt[:4]
    assert_agree((params["kernel"] - after) / rate, best, tolerance=0.002)


def moments_with_variances(*variances: list[float], count: int = 100) -> lora_jax.init.InputMoments:
    second = count * np.stack([np.diag(row) for row in variances])
    return lora_jax.init.InputMoments(
        jnp.asarray(second, jnp.float32), jnp.zeros(second.shape[:2]), jnp.asarray(count)
    )


def test_ranks_go_where_they_explain_the_most() -> None:
    moments = {
        "flat": moments_with_variances([1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        "steep": moments_with_variances([90.0, 5.0, 3.0, 1.0, 0.5, 0.5]),
        "middle": moments_with_variances([6.0, 5.0, 4.0, 0.1, 0.1, 0.1]),
    }
    # Shares: flat 1/6 each; steep 0.9, 0.05, ...; middle 0.39, 0.33, 0.26, 0.01.
    assert lora_jax.init.eva_ranks(moments, rank=2) == {
        "^flat$": {"rank": 2},
        "^steep$": {"rank": 1},
        "^middle$": {"rank": 3},
    }
    assert lora_jax.init.eva_ranks(moments, rank=2, rho=1.0) == {
        f"^{name}$": {"rank": 2} for name in moments
    }
    assert lora_jax.init.eva_ranks(moments, rank=1, rho=3.0) == {
        "^steep$": {"rank": 1},
        "^middle$": {"rank": 2},
    }
    assert lora_jax.init.eva_ranks(moments, rank=2, alpha=6.0)["^middle$"] == {
        "rank": 3,
        "alpha": 9.0,
    }


def test_stacked_matrices_share_a_rank_and_pay_for_each() -> None:
    moments = {
        "stack": moments_with_variances([55.0, 40.0, 5.0], [45.0, 50.0, 5.0]),
        "single": moments_with_variances([60.0, 20.0, 20.0]),
        "other": moments_with_variances([40.0, 30.0, 30.0]),
    }
    # In descending order: single 0.6 (1 of the budget of 4), stack 0.525 (2), stack 0.425 (2, of
    # which only 1 is left), ...
    assert lora_jax.init.eva_ranks(moments, rank=1) == {
        "^stack$": {"rank": 1},
        "^single$": {"rank": 1},
        "^other$": {"rank": 1},
    }


def test_shared_out_ranks_are_targets_of_those_paths_alone() -> None:
    leaf = jnp.ones((4, 4))
    params = {"a.b": {"kernel": leaf}, "block": {"a.b": {"kernel": leaf}}, "axb": {"kernel": leaf}}
    moments = {
        "a.b/kernel": moments_with_variances([5.0, 3.0, 1.0, 1.0]),
        "block/a.b/kernel": moments_with_variances([1.0, 1.0, 1.0, 1.0]),
        "axb/kernel": moments_with_variances([8.0, 1.0, 1.0, 0.0]),
    }
    targets = lora_jax.init.eva_ranks(moments, rank=1)
    wrapped = lora_jax.wrap(params, targets, init=lora_jax.init.eva(moments))
    assert wrapped["a.b"]["kernel"].rank == 2
    assert wrapped["axb"]["kernel"].rank == 1
    assert wrapped["block"]["a.b"]["kernel"] is leaf


@pytest.mark.parametrize(("name", "options"), [("rank", {"rank": 0}), ("rho", {"rho": 0.5})])
def test_ranks_that_cannot_be_shared_out_raise(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{name}` is"):
        lora_jax.init.eva_ranks({"kernel": moments_with_variances([1.0])}, **options)


MOMENTS = {"kernel": gathered_moments(np.ones((1, 4, 6)))}


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lora_jax.init.eva([1]), "`moments` is"),
        (lambda: lora_jax.init.corda({"kernel": jnp.ones((6, 6))}), "`moments` has .*'kernel'"),
        (lambda: lora_jax.init.corda(MOMENTS, mode="cpm"), "`mode` is 'cpm'.*'ipm'"),
        (lambda: lora_jax.init.corda(MOMENTS, damping=0.0), "`damping` is 0.0"),
        (lambda: lora_jax.init.lora_ga({}, direction="AB"), "`direction` is 'AB'.*'ArB2r'"),
        (lambda: lora_jax.init.lora_ga({}, gamma=0.0), "`gamma` is 0.0"),
    ],
)
def test_wrong_data_and_options_raise(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (
            lora_jax.init.eva({"other": MOMENTS["kernel"]}),
            "`init` has no statistics of 'kernel'.*'other'.*targets",
        ),
        (lora_jax.init.lora_ga({}), "`init` has no statistics of 'kernel'"),
        (
            lora_jax.init.eva({"kernel": gathered_moments(np.ones((2, 4, 6)))}),
            "'kernel'.*axis of 1",
        ),
        (lora_jax.init.eva({"kernel": gathered_moments(np.ones((1, 4, 5)))}), r"expected \(6, 6\)"),
        (
            lora_jax.init.corda({"kernel": gathered_moments(np.ones((1, 4, 5)))}),
            r"`moments`.*\(6, 6\)",
        ),
        (lora_jax.init.lora_ga({"kernel": jnp.ones((5, 6))}), r"\(5, 6\) for 'kernel'.*\(6, 5\)"),
        (lora_jax.init.lora_ga({"kernel": jnp.ones((6, 5))}), "`rank` is 3.*at most 2 fits"),
        ("eva", r"`init` is 'eva', which needs data.*eva\(moments\)"),
        (lora_jax.init.lora_ga, r"`init` is 'lora_ga'.*lora_ga\(gradients\)"),
        (lora_jax.init.corda, r"`init` is 'corda'.*corda\(moments\)"),
    ],
)
def test_data_that_does_not_fit_the_weight_raises(init: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora_jax.wrap({"kernel": jnp.ones((6, 5))}, "kernel", rank=3, init=init)


def test_statistics_are_mapped_over_with_the_matrices() -> None:
    axes = ("out", "batch", "in")
    leaf = random(5, 3, 4)
    matrices = to_matrices(leaf, axes)

    def init(key: Any, weight2d: Any, rank: int, scale: float, statistics: Any) -> Any:
        lora_A = statistics["offset"] + weight2d[:, :rank]
        return weight2d, lora_A, statistics["weights"][:rank]

    statistics = {"offset": jnp.arange(3.0), "weights": jnp.ones((3, 4, 5))}
    made = lora_jax.init.DataInitializer(init, {"kernel": statistics})
    weight = lora_jax.wrap({"kernel": leaf}, "kernel", rank=2, axes={"kernel": axes}, init=made)
    expected = matrices[:, :, :2] + jnp.arange(3.0)[:, None, None]
    np.testing.assert_array_equal(weight["kernel"].lora_A, expected)


def test_an_initialiser_of_one_target_may_differ() -> None:
    params = {"a": random(6, 6), "b": jnp.ones((6, 6))}
    init = lora_jax.init.lora_ga({"a": jnp.eye(6), "b": None})
    wrapped = lora_jax.wrap(params, {"a": {"init": init}, "b": {}}, rank=2)
    assert wrapped["a"].base is not params["a"]
    assert wrapped["b"].base is params["b"]


def test_the_errors_name_every_initialiser() -> None:
    with pytest.raises(ValueError, match="`init` is 'nope'") as caught:
        wrapped_kernel((4, 4), rank=2, init="nope")
    public = {name for name, value in vars(lora_jax.init).items() if inspect.isfunction(value)}
    for name in public - {"eva_ranks", "initializer"}:
        assert name in str(caught.value)


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_bfloat16_factors_lose_nothing_of_the_weight(name: str) -> None:
    """The base is what the rounded factors leave."""
    params = {"kernel": random(12, 10)}
    wrapped = lora_jax.wrap(params, "kernel", rank=3, alpha=5, dtype=jnp.bfloat16, init=name)
    assert wrapped["kernel"].lora_A.dtype == jnp.bfloat16
    for restored in (
        lora_jax.merge(wrapped),
        lora_jax.unwrap(wrapped),
        lora_jax.merge(lora_jax.arithmetic.on_original_base(wrapped)),
        lora_jax.unwrap(lora_jax.arithmetic.on_original_base(wrapped)),
    ):
        assert_agree(restored["kernel"], params["kernel"])
