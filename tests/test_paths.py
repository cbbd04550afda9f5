"""Paths are `/`-joined simple keys, whatever containers a model's parameters come in."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.core
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lora_jax
from lora_jax._paths import leaves_with_paths, map_with_paths, nearest_paths
from lora_jax.exchange import peft


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Attention:
    """A module of a hand-written model, with arrays right at its fields."""

    query: Any
    key: Any
    value: Any


class Pair(NamedTuple):
    kernel: Any
    bias: Any


class NnxModel(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs), nnx.Linear(2, 2, rngs=rngs)])
        self.scale = nnx.Param(jnp.ones(2))


def matrix() -> jax.Array:
    return jnp.ones((2, 2))


def haiku_params() -> Any:
    def network(x: jax.Array) -> jax.Array:
        return hk.nets.MLP([2], name="net")(x)

    return hk.transform(network).init(jax.random.key(0), jnp.ones((1, 2)))


TREES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "dict": (lambda: {"b": {"kernel": matrix()}, "a": matrix()}, ["a", "b/kernel"]),
    "list": (lambda: [matrix(), {"kernel": matrix()}], ["0", "1/kernel"]),
    "tuple": (lambda: {"layers": (matrix(), matrix())}, ["layers/0", "layers/1"]),
    "named tuple": (lambda: {"d": Pair(matrix(), matrix())}, ["d/kernel", "d/bias"]),
    "None has no path": (lambda: {"a": None, "b": matrix()}, ["b"]),
    "dict with a key 'value'": (lambda: {"a": {"value": matrix()}}, ["a/value"]),
    "dataclass": (lambda: Attention(matrix(), matrix(), matrix()), ["query", "key", "value"]),
    "dataclass inside": (
        lambda: {"a": Attention(matrix(), matrix(), matrix())},
        ["a/query", "a/key", "a/value"],
    ),
    "FrozenDict": (lambda: flax.core.freeze({"dense": {"kernel": matrix()}}), ["dense/kernel"]),
    "nnx.State": (
        lambda: nnx.state(NnxModel()),
        ["layers/0/bias", "layers/0/kernel", "layers/1/bias", "layers/1/kernel", "scale"],
    ),
    "equinox": (
        lambda: {"net": [eqx.nn.Linear(2, 2, key=jax.random.key(0))]},
        ["net/0/weight", "net/0/bias"],
    ),
    "haiku": (haiku_params, ["net/~/linear_0/b", "net/~/linear_0/w"]),
}


@pytest.fixture(params=TREES.values(), ids=TREES)
def tree_and_paths(request: pytest.FixtureRequest) -> tuple[Any, list[str]]:
    make, paths = request.param
    return make(), paths


def test_a_path_joins_the_keys(tree_and_paths: tuple[Any, list[str]]) -> None:
    tree, expected = tree_and_paths
    assert [path for path, _ in leaves_with_paths(tree)] == expected


def test_leaves_come_in_the_order_of_jax(tree_and_paths: tuple[Any, list[str]]) -> None:
    tree, _ = tree_and_paths
    for (_, leaf), expected in zip(leaves_with_paths(tree), jax.tree.leaves(tree), strict=True):
        assert leaf is expected


def test_mapping_keeps_the_structure(tree_and_paths: tuple[Any, list[str]]) -> None:
    tree, _ = tree_and_paths
    mapped = map_with_paths(lambda path, leaf: leaf + 1, tree)
    assert jax.tree.structure(mapped) == jax.tree.structure(tree)


def test_every_path_selects_its_leaf_and_no_other(tree_and_paths: tuple[Any, list[str]]) -> None:
    tree, paths = tree_and_paths
    matrices = [path for path, leaf in leaves_with_paths(tree) if leaf.ndim == 2]
    assert matrices
    assert len(set(paths)) == len(paths)
    for path in matrices:
        wrapped = lora_jax.wrap(tree, path, rank=1)
        adapted = [
            found
            for found, node in leaves_with_paths(
                wrapped, is_leaf=lambda node: isinstance(node, lora_jax.LoRAWeight)
            )
            if isinstance(node, lora_jax.LoRAWeight)
        ]
        assert adapted == [path]


@pytest.mark.parametrize(
    ("wanted", "best"),
    [("qury", "encoder/query/kernel"), ("OUT_KERNAL", "out_kernel"), ("hed", "head/kernel")],
)
def test_the_nearest_path_comes_first(wanted: str, best: str) -> None:
    paths = ["encoder/query/kernel", "out_kernel", "head/kernel", "norm/scale"]
    found = nearest_paths(wanted, paths)
    assert found[0] == best
    assert len(found) == 3


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass
class AttributeAndKey:
    """A container whose two children have different keys that read alike."""

    first: Any
    second: Any

    def tree_flatten_with_keys(self) -> Any:
        keys = jax.tree_util.GetAttrKey("kernel"), jax.tree_util.DictKey("kernel")
        return tuple(zip(keys, (self.first, self.second), strict=True)), None

    @classmethod
    def tree_unflatten(cls, _: Any, children: Any) -> Any:
        return cls(*children)


# For each way in which two leaves get one path: the tree of two leaves, and where they are.
CLASHES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a key that ends with a slash's segment": (
        lambda leaf: {"a/b": {"c": leaf}, "a": {"b/c": leaf}},
        r"'a/b/c': tree\['a'\]\['b/c'\] and tree\['a/b'\]\['c'\]",
    ),
    "a key with all segments": (
        lambda leaf: {"a/b": leaf, "a": {"b": leaf}},
        r"'a/b': tree\['a'\]\['b'\] and tree\['a/b'\]",
    ),
    "a place in a list": (
        lambda leaf: {"a": [leaf, leaf], "a/1": leaf},
        r"'a/1': tree\['a'\]\[1\] and tree\['a/1'\]",
    ),
    "a key and an attribute": (
        lambda leaf: {"a": AttributeAndKey(leaf, leaf)},
        r"'a/kernel': tree\['a'\]\.kernel and tree\['a'\]\['kernel'\]",
    ),
}


def matrices_of(params: Any, x: jax.Array) -> Any:
    return sum(jnp.sum(x @ leaf) for leaf in jax.tree.leaves(params))


def adapter_node() -> Any:
    return lora_jax.wrap({"kernel": matrix()}, "kernel", rank=1)["kernel"]


RULES = [peft.Rule("{module:.+}.weight", "{module:.+}")]

OF_PARAMS: dict[str, Callable[[Any, Any], Any]] = {
    "wrap": lambda tree, folder: lora_jax.wrap(tree, ".*", rank=1),
    "infer_axes": lambda tree, folder: lora_jax.infer_axes(matrices_of, tree, matrix()),
    "input_moments": lambda tree, folder: lora_jax.init.input_moments(
        matrices_of, tree, [matrix()], targets=".*"
    ),
    "extract": lambda tree, folder: lora_jax.arithmetic.extract(tree, tree, ".*", rank=1),
    "init.lora_ga": lambda tree, folder: lora_jax.init.lora_ga(tree),
    "restore": lambda tree, folder: lora_jax.restore(folder, tree),
    "peft.preview": lambda tree, folder: peft.preview(tree, names=RULES),
}
OF_WRAPPED: dict[str, Callable[[Any, Any], Any]] = {
    "merge": lambda tree, folder: lora_jax.merge(tree),
    "merge some": lambda tree, folder: lora_jax.merge(tree, targets="a"),
    "unmerge": lambda tree, folder: lora_jax.unmerge(tree, tree, targets="a"),
    "resize": lambda tree, folder: lora_jax.arithmetic.resize(tree, 2),
    "summary": lambda tree, folder: lora_jax.summary(tree),
    "save": lambda tree, folder: lora_jax.save(folder / "other", tree),
    "stack": lambda tree, folder: lora_jax.serving.bank([tree]),
    "peft.save": lambda tree, folder: peft.save(folder / "other", tree, names=RULES),
}


@pytest.mark.parametrize("clash", CLASHES)
@pytest.mark.parametrize("name", [*OF_PARAMS, *OF_WRAPPED])
def test_two_leaves_of_one_path_are_refused(name: str, clash: str, saved: Any) -> None:
    make, message = CLASHES[clash]
    tree = make(matrix() if name in OF_PARAMS else adapter_node())
    with pytest.raises(ValueError, match=f"{message}.*rename a key"):
        (OF_PARAMS | OF_WRAPPED)[name](tree, saved)
    assert not (saved / "other").exists()


def test_a_clash_of_leaves_that_nobody_adapts_is_refused_too() -> None:
    tree = {"norm/scale": jnp.ones(2), "norm": {"scale": jnp.ones(2)}, "kernel": matrix()}
    with pytest.raises(ValueError, match="have the path 'norm/scale'"):
        lora_jax.wrap(tree, "kernel", rank=1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("adapters") / "saved"
    lora_jax.save(folder, {"kernel": adapter_node()})
    return folder
