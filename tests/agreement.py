"""How tests compare the results of two programs.

Two programs that compute one number, eager and compiled, factored and dense, round in another
order on every processor: they agree relative to the size of what they sum. Only one program run
twice, or data that is moved and not computed with, agrees bit for bit:
`np.testing.assert_array_equal` is for those.
"""

from typing import Any

import jax
import numpy as np


def assert_agree(actual: Any, expected: Any, *, tolerance: float = 1e-5, size: Any = None) -> None:
    """Asserts that two trees have one structure, the same shapes, and agree up to rounding.

    Every leaf by itself must satisfy, in float64 and with Frobenius norms,

        ‖actual − expected‖ ≤ tolerance · ‖expected‖,

    so that a small leaf is compared as strictly as a large one beside it. Dtypes may differ. NaN
    and infinities never agree. Leaves of integers and booleans must be equal.

    Args:
      actual: a tree of arrays or numbers.
      expected: the same tree as the other program gives it, or as a float64 reference does.
      tolerance: the largest relative error. The default fits float32; sums of a few hundred terms
        leave about 1e-6.
      size: what takes the place of `expected` on the right-hand side. A result in which large
        terms cancel agrees only relative to those terms: `size=W` for `(W + AB) − AB`. A number or
        an array for every leaf, or a tree of them that is a prefix of `expected`.

    Raises:
      AssertionError: with the path of the worst leaf, its error and the tolerance.
    """
    structures = jax.tree.structure(actual), jax.tree.structure(expected)
    assert structures[0] == structures[1], f"the structure is {structures[0]}, not {structures[1]}"
    pairs = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), np.asarray(a), np.asarray(e))
        for (path, a), e in zip(
            jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
        )
    ]
    for path, a, e in pairs:
        assert a.shape == e.shape, f"{named(path)} has the shape {a.shape}, not {e.shape}"
    sizes = [e for _, _, e in pairs] if size is None else jax.tree.leaves(broadcast(size, expected))
    errors = [
        (relative_error(a, e, norm(scale)), path)
        for (path, a, e), scale in zip(pairs, sizes, strict=True)
    ]
    # NaN is larger than no number, and must not hide behind a leaf that agrees.
    error, path = max(errors, key=lambda pair: np.nan_to_num(pair[0], nan=np.inf), default=(0, ""))
    assert error <= tolerance, (
        f"{named(path)} has a relative error of {error:.3g}; the tolerance is {tolerance:.3g}"
    )


def assert_identical(actual: Any, expected: Any) -> None:
    """Asserts that two trees have one structure and the same bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        assert bits(got) == bits(wanted)


def bits(leaf: Any) -> bytes:
    """Returns the bits of an array, or of the data of random keys."""
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()


def relative_error(actual: np.ndarray, expected: np.ndarray, size: float) -> float:
    """Returns the norm of the difference over `size`, in float64: 0 where both are zero."""
    if not is_inexact(expected) and not is_inexact(actual):
        return 0.0 if np.array_equal(actual, expected) else np.inf
    with np.errstate(invalid="ignore"):
        error = norm(in_float64(actual) - in_float64(expected))
    if error == 0:
        return 0.0
    return error / size if size else np.inf


def norm(x: Any) -> float:
    return float(np.linalg.norm(in_float64(np.asarray(x)).ravel()))


def in_float64(x: np.ndarray) -> np.ndarray:
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def is_inexact(x: np.ndarray) -> bool:
    return jax.dtypes.issubdtype(x.dtype, np.inexact)


def broadcast(prefix: Any, tree: Any) -> Any:
    """Returns a tree like `tree`, with each leaf of `prefix` at all leaves below its place."""
    return jax.tree.map(lambda leaf, below: jax.tree.map(lambda _: leaf, below), prefix, tree)


def named(path: str) -> str:
    return f"the leaf {path!r}" if path else "the array"
