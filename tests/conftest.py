"""What every test runs under: strict dtypes, eight devices on a plain CPU, and quick compiling."""

import contextlib
import gc
import hashlib
import math
import os
from collections.abc import Iterator, Sequence

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiments.common.memory import host_bytes, return_freed_memory
from tests.typechecking import annotations_unchecked

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)

# Compiling is most of what the suite does, here and in processes that tests start. Tests that read
# the compiled program turn this off.
jax.config.update("jax_disable_most_optimizations", True)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# XLA's older emitters compile small programs in half the time, and in one piece a little faster.
# Newer versions have no others, and refuse the flag. It changes the instructions, not what is
# counted of a program.
if jax.__version_info__ < (0, 11):
    flags = ("xla_cpu_use_fusion_emitters=false", "xla_cpu_parallel_codegen_split_count=1")
    os.environ["XLA_FLAGS"] = " ".join(
        [os.environ.get("XLA_FLAGS", ""), *(f"--{f}" for f in flags)]
    )

# Tracing makes many objects that live long: looking through them less often saves a sixth.
gc.set_threshold(200_000, 50, 100)

# A process that holds more frees the programs of finished modules.
MEMORY = 3 * 1024**3


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--share",
        type=float,
        default=1.0,
        help="of the cases of each test, the share that runs; one of each at least",
    )
    parser.addoption("--draw", default="", help="a text; another one draws other cases")


def pytest_configure(config: pytest.Config) -> None:
    """Shares compiled programs between modules, workers and runs: most are small and repeat."""
    programs = str(config.cache.mkdir("programs"))
    jax.config.update("jax_compilation_cache_dir", programs)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # One worker may read what another has not finished to write, and compiles it then.
    config.addinivalue_line(
        "filterwarnings", "ignore:Error reading persistent compilation cache entry:UserWarning"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out cases, and puts modules with slow tests first.

    So no worker is left alone with one of these at the end. Before them come tests that read costs
    off optimised programs: between those and others all programs are dropped.
    """
    if config.option.share < 1:
        kept = drawn([item.nodeid for item in items], config.option.share, config.option.draw)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
        items[:] = [item for item in items if item.nodeid in kept]
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (not is_optimised(item), item.path not in slow))


def drawn(names: Sequence[str], share: float, draw: str) -> set[str]:
    """Returns a share of the cases of each test, one at least: the same ones for the same draw."""
    cases: dict[str, list[str]] = {}
    for name in names:
        cases.setdefault(name.partition("[")[0], []).append(name)
    kept: set[str] = set()
    for own in cases.values():
        shuffled = sorted(own, key=lambda name: hashlib.sha256((draw + name).encode()).digest())
        kept.update(shuffled[: math.ceil(len(own) * share)])
    return kept


@pytest.fixture(autouse=True, scope="module")
def no_programs_of_other_modules() -> Iterator[None]:
    """Frees compiled programs between modules, which would add up to many gigabytes."""
    yield
    free_programs()


def free_programs() -> None:
    """Frees what JAX keeps of programs, if this process holds much memory."""
    if host_bytes() > MEMORY:
        jax.clear_caches()
        gc.collect()
        return_freed_memory()


def optimise(value: bool) -> None:
    jax.config.update("jax_disable_most_optimizations", not value)
    # The text of a program that was read from the disk is another.
    jax.config.update("jax_enable_compilation_cache", not value)
    compilation_cache.reset_cache()
    jax.clear_caches()


def is_optimised(item: pytest.Item) -> bool:
    """Says whether a test reads costs off the program that a user would run."""
    return "optimised" in getattr(item, "fixturenames", ())


@pytest.fixture
def optimised() -> None:
    """Lets a test read costs off the program that a user would run."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Optimises for the tests that ask for it; what was compiled in the other way is dropped.

    It comes before the fixtures of the module, which compile too.
    """
    wanted = is_optimised(item)
    if wanted == jax.config.values["jax_disable_most_optimizations"]:
        optimise(wanted)


@pytest.fixture(autouse=True)
def annotations(request: pytest.FixtureRequest) -> Iterator[None]:
    """Checks annotations, but not where a test gives another type on purpose."""
    wrong = request.node.get_closest_marker("wrong_types") is not None
    with annotations_unchecked() if wrong else contextlib.nullcontext():
        yield


@pytest.fixture
def promoted_ranks() -> Iterator[None]:
    """Lets a model of others add a bias to a batch as it is."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def float64() -> Iterator[None]:
    """Lets a test compute its reference in float64, which JAX otherwise truncates to float32."""
    with jax.enable_x64(True):
        yield
