"""Initialisers beside those of Hugging Face PEFT, whose torch weights are the transpose of ours."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.agreement import assert_agree

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

# PEFT recommends an option for models that hardly fit into memory.
pytestmark = pytest.mark.filterwarnings(
    "ignore:lora with eva initialization used with low_cpu_mem_usage=False:UserWarning"
)

Factors = tuple[np.ndarray, np.ndarray, np.ndarray]

RANK, ALPHA = 3, 6.0
SCALE = ALPHA / RANK
SHAPES = [(12, 10), (10, 12)]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Leaves torch's global random state as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def kernel(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def rows(inputs: int) -> np.ndarray:
    deviations = np.linspace(2, 0.2, inputs)
    values = np.random.default_rng(2).normal(size=(40, inputs)) * deviations
    return (0.3 + values).astype(np.float32)


def gathered_moments(values: np.ndarray) -> lora_jax.init.InputMoments:
    wide = values.astype(np.float64)
    return lora_jax.init.InputMoments(
        second=jnp.asarray(wide.T @ wide, jnp.float32)[None],
        first=jnp.asarray(wide.sum(0), jnp.float32)[None],
        count=jnp.array([len(values)]),
    )


def torch_model(*kernels: np.ndarray) -> Any:
    """Returns a chain of layers, called "0", "1", ..., that compute x · kernel."""
    layers = []
    for values in kernels:
        layer = torch.nn.Linear(*values.shape, bias=False)
        layer.weight.data = torch.tensor(values.T)
        layers.append(layer)
    return torch.nn.Sequential(*layers)


def configuration(init: Any, **options: Any) -> Any:
    return peft.LoraConfig(
        init_lora_weights=init,
        **{"r": RANK, "lora_alpha": ALPHA, "target_modules": ["0"], **options},
    )


def factors_of(layer: Any) -> Factors:
    """Returns base, lora_A and lora_B of a PEFT layer the way we write them."""
    return tuple(
        np.asarray(module.weight.detach()).T
        for module in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"])
    )


def from_peft(
    values: np.ndarray, init: Any, prepare: Callable[[Any, Any], Any] | None = None, **options: Any
) -> Factors:
    model, config = torch_model(values), configuration(init, **options)
    if prepare is not None:
        prepare(model, config)
    return factors_of(peft.get_peft_model(model, config).base_model.model[0])


def from_us(values: np.ndarray, init: Any, **options: Any) -> Factors:
    settings = {"rank": RANK, "alpha": ALPHA, "init": init, **options}
    weight = lora_jax.wrap({"kernel": jnp.asarray(values)}, "kernel", **settings)["kernel"]
    return tuple(np.asarray(part) for part in (weight.base, weight.lora_A, weight.lora_B))


def assert_same_split(ours: Factors, theirs: Factors) -> None:
    """Asserts that the residual and the product are the same; then so is the weight."""
    # The residual is the weight without the product, which may be nearly all of it.
    weight = ours[0] + SCALE * ours[1] @ ours[2]
    assert_agree(ours[0], theirs[0], size=weight)
    factors = np.linalg.norm(theirs[1]) * np.linalg.norm(theirs[2])
    assert_agree(ours[1] @ ours[2], theirs[1] @ theirs[2], size=factors)


def assert_same_factors_up_to_sign(ours: Factors, theirs: Factors) -> None:
    assert_agree(abs(ours[1]), abs(theirs[1]))
    assert_agree(abs(ours[2]), abs(theirs[2]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("init", ["pissa", "olora", "mica"])
def test_what_needs_no_data_is_the_same(init: str, shape: tuple[int, int]) -> None:
    values = kernel(shape)
    ours, theirs = from_us(values, init), from_peft(values, init)
    assert_same_split(ours, theirs)
    assert_same_factors_up_to_sign(ours, theirs)


def test_mica_freezes_the_same_factor() -> None:
    model = peft.get_peft_model(torch_model(kernel((12, 10))), configuration("mica"))
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {"base_model.model.0.lora_A.default.weight"}
    _, lora_A, lora_B = lora_jax.init.mica(
        jax.random.key(0), jnp.asarray(kernel((12, 10))), RANK, SCALE
    )
    assert isinstance(lora_B, lora_jax.init.Frozen)
    assert isinstance(lora_A, jax.Array)


@pytest.mark.parametrize("shape", SHAPES)
def test_randomised_pissa_is_the_same_where_the_spectrum_decays(shape: tuple[int, int]) -> None:
    """PEFT follows no more directions than the rank, so that it is exact only for such a weight."""
    U, _, Vt = np.linalg.svd(kernel(shape), full_matrices=False)
    values = ((U * 0.1 ** np.arange(10)) @ Vt).astype(np.float32)

    def ours(*arguments: Any) -> Any:
        return lora_jax.init.pissa(*arguments, power_iterations=4, oversampling=0)

    assert_same_split(from_us(values, ours), from_peft(values, "pissa_niter_4"))


def test_orthogonal_is_another_construction() -> None:
    """Both leave the base and start at a product of zero; PEFT's factors have half the rank."""
    values = kernel((12, 10))
    ours = from_us(values, "orthogonal", rank=4, alpha=4.0)
    theirs = from_peft(values, "orthogonal", r=4, lora_alpha=4)
    assert_same_split(ours, theirs)
    assert np.linalg.matrix_rank(theirs[1]) == np.linalg.matrix_rank(theirs[2]) == 2
    assert_agree(ours[1].T @ ours[1], np.eye(4))
    assert not ours[2].any()
    with pytest.raises(ValueError, match="even"):
        from_peft(values, "orthogonal", r=3)


def eva_from_peft(kernels: list[np.ndarray], values: np.ndarray, **options: Any) -> Any:
    names = [str(index) for index in range(len(kernels))]
    rho = options.pop("rho", 1.0)
    config = configuration(
        "eva", target_modules=names, eva_config=peft.EvaConfig(rho=rho), **options
    )
    model = peft.get_peft_model(torch_model(*kernels), config)
    peft.initialize_lora_eva_weights(
        model,
        [torch.tensor(values)],
        forward_fn=lambda model, inputs: model(inputs),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda layer_input, *_: (
            layer_input[0] if isinstance(layer_input, tuple) else layer_input
        ),
        show_progress_bar=False,
    )
    return model


@pytest.mark.parametrize("shape", [(6, 10), (6, 5)])
def test_eva_is_the_same(shape: tuple[int, int]) -> None:
    """PEFT iterates 2 · rank directions, so that it is exact where there are no more than that."""
    values = kernel(shape)
    seen = rows(shape[0])
    theirs = factors_of(eva_from_peft([values], seen).base_model.model[0])
    ours = from_us(values, lora_jax.init.eva({"kernel": gathered_moments(seen)}))
    assert_same_split(ours, theirs)
    assert_agree(ours[1], theirs[1])


def test_eva_shares_out_the_same_ranks() -> None:
    """One rank a layer is the budget; the first layer's inputs are even and get none of it."""
    generator = np.random.default_rng(4)
    kernels = [generator.normal(size=(4, 4)).astype(np.float32) for _ in range(3)]
    kernels[0] = (kernels[0] / 10 + np.diag([3.0, 2.5, 0.1, 0.1])).astype(np.float32)
    kernels[1] = np.outer([1.0, 2.0, -1.0, 0.5], [1.0, 1.0, 0.5, -1.0]).astype(np.float32)
    seen = generator.normal(size=(1000, 4)).astype(np.float32)
    model = eva_from_peft(kernels, seen, r=1, lora_alpha=2.0, rho=2.0)
    theirs = {
        name: (layer.r["default"], layer.scaling["default"])
        for name, layer in model.base_model.model.named_children()
        if hasattr(layer, "lora_A")
    }
    inputs = [seen, seen @ kernels[0], seen @ kernels[0] @ kernels[1]]
    moments = {str(index): gathered_moments(values) for index, values in enumerate(inputs)}
    targets = lora_jax.init.eva_ranks(moments, rank=1, alpha=2.0)
    params = {str(index): jnp.asarray(values) for index, values in enumerate(kernels)}
    wrapped = lora_jax.wrap(params, targets, init=lora_jax.init.eva(moments))
    ours = {
        name: (leaf.rank, float(leaf.scale))
        for name, leaf in wrapped.items()
        if isinstance(leaf, lora_jax.LoRAWeight)
    }
    assert ours == theirs
    assert {rank for rank, _ in ours.values()} == {1, 2}
    assert set(ours) < set(params)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_is_the_same_but_for_the_balance_of_the_factors(
    mode: Any, shape: tuple[int, int]
) -> None:
    """PEFT divides the inputs by their maximum, which moves a number from one factor to the other.

    That is so where all inputs come in one call; over several, it weighs each by its own maximum.
    """
    values = kernel(shape)
    seen = rows(shape[0])
    corda = pytest.importorskip("peft.tuners.lora.corda")

    def prepare(model: Any, config: Any) -> None:
        corda.preprocess_corda(model, config, lambda: model(torch.tensor(seen)))

    theirs = from_peft(
        values,
        "corda",
        prepare,
        corda_config=peft.tuners.lora.config.CordaConfig(corda_method=mode),
    )
    ours = from_us(values, lora_jax.init.corda({"kernel": gathered_moments(seen)}, mode=mode))
    assert_same_split(ours, theirs)
    wide = seen.astype(np.float64)
    balance = np.mean(np.sum((wide / wide.max()) ** 2, axis=0))
    balanced = (theirs[0], theirs[1] * np.sqrt(balance), theirs[2] / np.sqrt(balance))
    assert_same_factors_up_to_sign(ours, balanced)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_lora_ga_takes_the_same_directions(direction: Any, shape: tuple[int, int]) -> None:
    """PEFT multiplies its B by the gradient's singular values; the paper and we do not."""
    values, seen, wanted = kernel(shape), rows(shape[0]), rows(shape[1])
    loraga = pytest.importorskip("peft.tuners.lora.loraga")

    def prepare(model: Any, config: Any) -> None:
        def train_step() -> None:
            # A layer whose input needs no gradient makes torch warn of PEFT's hook.
            outputs = model(torch.tensor(seen, requires_grad=True))
            ((outputs - torch.tensor(wanted)) ** 2).mean().backward()

        loraga.preprocess_loraga(model, config, train_step)

    theirs = from_peft(
        values,
        "lora_ga",
        prepare,
        lora_ga_config=peft.LoraGAConfig(direction=direction, scale="unit"),
    )
    gradients = jax.grad(lambda params: jnp.mean((seen @ params["kernel"] - wanted) ** 2))(
        {"kernel": jnp.asarray(values)}
    )
    ours = from_us(values, lora_jax.init.lora_ga(gradients, direction=direction, gamma=None))
    S = np.linalg.svd(np.asarray(gradients["kernel"]), compute_uv=False)
    of_B = {"ArB2r": S[3:6], "A2rBr": S[:3], "ArBr": S[0:6:2]}[direction]
    lora_A, lora_B = ours[1], of_B[:, None] * ours[2]
    assert_same_factors_up_to_sign((ours[0], lora_A, lora_B), theirs)
    # A column of lora_A and its row of lora_B belong to different singular values, so that their
    # signs are free of each other. With the signs that PEFT happens to get, all is the same.
    signs = np.sign(np.sum(lora_A * theirs[1], axis=0) * np.sum(lora_B * theirs[2], axis=1))
    product = (lora_A * signs) @ lora_B
    assert_agree(product, theirs[1] @ theirs[2])
    assert_agree(values - SCALE * product, theirs[0])
    assert_agree(values - SCALE * ours[1] @ ours[2], ours[0])
