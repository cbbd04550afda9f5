"""How the library hangs together: imports point one way, and importing it stays cheap."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "lora_jax"

# A module imports from its own layer and from those before it. A new module needs a place here.
LAYERS = (
    {
        "_compat",
        "_dtypes",
        "_finite",
        "_folders",
        "_identity",
        "_keys",
        "_leaf_kinds",
        "_matrices",
        "_partition",
        "_paths",
        "_processes",
        "_row_selection",
        "_serialization",
        "_shapes",
        "_tables",
        "_version",
        "quantization",
    },
    {"_node_shardings", "_nodes", "_norms", "_originals", "_values", "_weight"},
    {
        "_axes",
        "_initial_factors",
        "_merge",
        "_optimizer",
        "_quantize",
        "_requantize",
        "_row_weight",
        "_selection",
        "_settings",
        "_summary",
        "_targets",
        "_train",
        "_wrap",
        "init",
        "transform",
        "updates",
    },
    {"arithmetic"},
    {"checkpoint", "exchange", "serving", "sharding"},
    {"__init__"},
)
LAYER_OF = {module: level for level, modules in enumerate(LAYERS) for module in modules}

OWN_FILES = sorted(
    file
    for folder in ("lora_jax", "experiments", "tests")
    for file in (ROOT / folder).rglob("*.py")
)
LIBRARY_FILES = sorted(LIBRARY.rglob("*.py"))
STUDY_FILES = sorted((ROOT / "experiments").rglob("*.py"))

# What is in `experiments/` imports from itself and from the layers before it. A new study adds its
# package to the fourth layer, and its command to the last.
STUDY_LAYERS = (
    {"common"},
    {"data"},
    {"models"},
    {"llm", "mnist", "text"},
    {"images", "pretraining", "ranks"},
    {
        "__init__",
        "image_lora",
        "llm_lora",
        "mlp_lora",
        "mnist_lora",
        "pretrain_t5",
        "rank_study",
        "text_lora",
        "two_tasks",
    },
)
STUDY_LAYER_OF = {part: level for level, parts in enumerate(STUDY_LAYERS) for part in parts}


def module_name(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of_package(module):
    """Returns what stands right below `lora_jax` or `experiments` in a module's name."""
    return [*module.split("."), "__init__"][1]


def imported_modules(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            yield from (_submodule(node.module, alias.name) for alias in node.names)


def _submodule(module, name):
    """Returns the module that `from module import name` reads."""
    path = ROOT.joinpath(*module.split("."), name)
    is_module = path.is_dir() or path.with_suffix(".py").is_file()
    return f"{module}.{name}" if is_module else module


def mentioned_modules(tree):
    """Returns what a file imports and the dotted names that it uses, such as `jax.lax.scan`."""
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    imports = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return attributes | imports | set(imported_modules(ast.walk(tree)))


def parse(file):
    return ast.parse(file.read_text(encoding="utf-8"))


def relative(file):
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", LIBRARY_FILES, ids=relative)
def test_imports_point_one_way(file):
    own = part_of_package(module_name(file))
    assert own in LAYER_OF, f"{own} has no place in LAYERS"
    for module in imported_modules(ast.walk(parse(file))):
        if module.split(".")[0] == "lora_jax":
            other = part_of_package(module)
            assert LAYER_OF[other] <= LAYER_OF[own], f"{relative(file)} imports {module}"


def test_no_import_leads_back():
    graph = {
        module_name(file): set(imported_modules(ast.walk(parse(file)))) - {module_name(file)}
        for file in [*LIBRARY_FILES, *STUDY_FILES]
    }
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("file", STUDY_FILES, ids=relative)
def test_imports_of_studies_point_one_way(file):
    own = part_of_package(module_name(file))
    assert own in STUDY_LAYER_OF, f"{own} has no place in STUDY_LAYERS"
    for module in imported_modules(ast.walk(parse(file))):
        package = module.split(".")[0]
        assert package not in {"benchmarks", "tests"}, f"{relative(file)} imports {module}"
        if package == "experiments" and (other := part_of_package(module)) != own:
            is_below = STUDY_LAYER_OF[other] < STUDY_LAYER_OF[own]
            assert is_below, f"{relative(file)} imports {module}"


@pytest.mark.parametrize("file", OWN_FILES, ids=relative)
def test_no_internals_of_jax(file):
    forbidden = ["jax._src", "jax.interpreters"]
    if relative(file) != "lora_jax/_compat.py":
        forbidden += ["jax.core", "jax.extend"]
    used = [
        name
        for name in mentioned_modules(parse(file))
        if any(name == module or name.startswith(f"{module}.") for module in forbidden)
    ]
    assert not used, f"{relative(file)} uses {used}"


def test_the_library_does_not_need_the_experiments():
    for file in LIBRARY_FILES:
        modules = {name.split(".")[0] for name in imported_modules(ast.walk(parse(file)))}
        assert not modules & {"experiments", "benchmarks", "tests"}, relative(file)


def test_importing_is_quiet_and_loads_nothing_heavy():
    heavy = {
        "chex",
        "equinox",
        "flax",
        "gguf",
        "haiku",
        "matplotlib",
        "orbax",
        "safetensors",
        "tensorflow",
        "tensorflow_datasets",
    }
    code = "import lora_jax, sys; print(*sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not {name.split(".")[0] for name in done.stdout.split()} & heavy
