"""`blend` beside Hugging Face PEFT's `add_weighted_adapter`, from the same numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.arithmetic import _recipes
from tests.agreement import assert_agree

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
merge_utils = pytest.importorskip("peft.utils.merge_utils")

RANKS = (4, 4, 4)
INPUTS, OUTPUTS = 12, 10
WEIGHTS = [0.7, 0.4, 1.2]


def adapted_modules(rslora: bool, ranks: tuple[int, ...] = RANKS) -> Any:
    """Returns a PEFT model of one linear layer, with an adapter for each rank."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(INPUTS, OUTPUTS, bias=False))
    for number, rank in enumerate(ranks):
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=3.0 + number,
            target_modules=["0"],
            use_rslora=rslora,
            init_lora_weights=False,
        )
        if number == 0:
            module = peft.get_peft_model(module, config, adapter_name="0")
        else:
            module.add_adapter(str(number), config)
    return module


def ours(module: Any, rslora: bool, ranks: tuple[int, ...] = RANKS) -> list[Any]:
    """Returns the same adapters here."""
    layer = module.base_model.model[0]
    params = {"kernel": numbers(layer.base_layer.weight).T}
    return [
        {
            "kernel": lora_jax.LoRAWeight(
                base=wrapped["kernel"].base,
                lora_A=numbers(layer.lora_A[str(number)].weight).T,
                lora_B=numbers(layer.lora_B[str(number)].weight).T,
                scale=wrapped["kernel"].scale,
                axes=("in", "out"),
            )
        }
        for number, rank in enumerate(ranks)
        for wrapped in [
            lora_jax.wrap(params, "kernel", rank=rank, alpha=3.0 + number, rslora=rslora)
        ]
    ]


def numbers(tensor: Any) -> jax.Array:
    return jnp.asarray(tensor.detach().numpy())


def merged_by_peft(module: Any, method: str, weights: list[float], **options: Any) -> np.ndarray:
    names = [str(number) for number in range(len(weights))]
    module.add_weighted_adapter(names, weights, "merged", combination_type=method, **options)
    layer = module.base_model.model[0]
    lora_A, lora_B = layer.lora_A["merged"].weight, layer.lora_B["merged"].weight
    return (lora_B @ lora_A).detach().numpy().T * layer.scaling["merged"]


def change(wrapped: Any) -> np.ndarray:
    node = wrapped["kernel"]
    return np.asarray(node.scale * (node.lora_A @ node.lora_B))


@pytest.mark.parametrize("method", ["cat", "svd", "linear", "magnitude_prune", "ties"])
@pytest.mark.parametrize("negative", [False, True])
def test_the_methods_beside_peft(method: Any, negative: bool) -> None:
    weights = [-0.7, 0.4, 1.2] if negative else WEIGHTS
    if method == "ties":
        # Shares that are equal, so that it makes no difference when the signs are elected.
        weights = [4 / (3.0 + number) for number in range(3)]
    density = {"density": 0.5} if method in ("magnitude_prune", "ties") else {}
    module = adapted_modules(rslora=False)
    wrappeds = ours(module, rslora=False)
    combined = lora_jax.arithmetic.blend(wrappeds, weights, method, **density)
    expected = merged_by_peft(module, method, weights, **density)
    assert_agree(change(combined), expected, tolerance=1e-4)


@pytest.mark.parametrize("method", ["magnitude_prune_svd", "ties_svd"])
def test_the_methods_on_full_changes_beside_peft(method: Any) -> None:
    module = adapted_modules(rslora=False)
    wrappeds = ours(module, rslora=False)
    weights = [1.0, 1.0, 1.0]
    combined = lora_jax.arithmetic.blend(wrappeds, weights, method, density=0.5, rank=6)
    expected = merged_by_peft(module, method, weights, density=0.5, svd_rank=6)
    assert_agree(change(combined), expected, tolerance=1e-4)


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_the_sum_is_exact_where_peft_is_off_by_the_root_of_the_rank(method: Any) -> None:
    module = adapted_modules(rslora=True)
    wrappeds = ours(module, rslora=True)
    rank = sum(RANKS) if method == "cat" else 10
    options = {} if method == "cat" else {"rank": rank}
    combined = lora_jax.arithmetic.blend(wrappeds, WEIGHTS, method, **options)
    exact = sum(w * change(each) for w, each in zip(WEIGHTS, wrappeds, strict=True))
    assert_agree(change(combined), exact, tolerance=1e-4)
    # The scale of PEFT's result is α/√r with α = r.
    peft_options = {} if method == "cat" else {"svd_rank": rank}
    off = merged_by_peft(module, method, WEIGHTS, **peft_options)
    assert_agree(off, rank**0.5 * exact, tolerance=1e-4)


@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.25, 0.5])
def test_the_rules_for_arrays_beside_peft(majority_sign: Any, density: float) -> None:
    tasks = np.random.default_rng(0).normal(size=(3, 8, 6)).astype(np.float32)
    actual = _recipes.RECIPES["ties"].merged(
        jnp.asarray(tasks)[:, None],
        jnp.full(3, 0.8),
        density=density,
        majority_sign=majority_sign,
        key=jax.random.key(0),
    )[0]
    tensors = [torch.tensor(task) for task in tasks]
    expected = merge_utils.ties(tensors, torch.full((3,), 0.8), density, majority_sign).numpy()
    signs = np.sign([merge_utils.prune(each, density, "magnitude").numpy() for each in tensors])
    even = (signs.sum(axis=0) == 0) & (majority_sign == "frequency")
    assert_agree(np.asarray(actual)[~even], expected[~even])
    assert not np.any(np.asarray(actual)[even])
    pruned = _recipes.largest_kept(jnp.asarray(tasks)[:, None], density)[:, 0]
    for each, tensor in zip(np.asarray(pruned), tensors, strict=True):
        np.testing.assert_array_equal(each, merge_utils.prune(tensor, density, "magnitude").numpy())
