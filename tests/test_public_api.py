"""Every public name is on the API page, and documented with an example."""

import importlib
import inspect
import pkgutil
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lora_jax
from lora_jax.checkpoint import TrainingCheckpoints

API_PAGE = Path(__file__).parent.parent / "docs" / "api.md"

# For those who work on the library: nobody calls a rule.
INTERNAL = "lora_jax.transform.rules"


def public_modules() -> Iterator[types.ModuleType]:
    yield lora_jax
    for module in pkgutil.walk_packages(lora_jax.__path__, "lora_jax."):
        if "._" not in module.name and not module.name.startswith(INTERNAL):
            yield importlib.import_module(module.name)


def public_names(module: types.ModuleType) -> dict[str, Any]:
    return {
        f"{module.__name__}.{name}": value
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }


def listed_names() -> list[str]:
    return re.findall("^::: (.+)$", API_PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def resolved(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


PUBLIC = {
    name: value for module in public_modules() for name, value in public_names(module).items()
}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}

# Classes that no user makes, and the function or class whose example shows where they come from.
SHOWN_BY = {
    "ForeignWeight": lora_jax.quantization.declare,
    "FullWeight": lora_jax.wrap,
    "InferredAxes": lora_jax.infer_axes,
    "Initializer": lora_jax.init.initializer,
    "ParameterCounts": lora_jax.count_parameters,
    "Preview": lora_jax.exchange.peft.preview,
    "QuantizingInitializer": lora_jax.init.loftq,
    "Report": lora_jax.explain,
    "RequantizationError": lora_jax.requantization_errors,
    "TargetReport": lora_jax.explain,
    "TrainingState": TrainingCheckpoints,
    "Use": lora_jax.explain,
    "WeightUse": lora_jax.infer_axes,
}

CONTRACT = [
    "LoRAWeight",
    "adapt",
    "combine",
    "count_parameters",
    "explain",
    "infer_axes",
    "labels",
    "merge",
    "optimizer",
    "restore",
    "save",
    "split",
    "summary",
    "unmerge",
    "unwrap",
    "wrap",
]


@pytest.mark.parametrize("name", CONTRACT)
def test_the_names_of_the_contract_are_there(name: str) -> None:
    assert hasattr(lora_jax, name)


def test_everything_public_is_a_function_or_a_class() -> None:
    assert set(PUBLIC) == set(FUNCTIONS) | set(CLASSES)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_api_page_lists_it_once(name: str) -> None:
    """By one of its names, if it has several."""
    listed = [other for other in listed_names() if resolved(other) is PUBLIC[name]]
    assert len(listed) == 1, f"docs/api.md has {listed or 'no line'} for `::: {name}`"


@pytest.mark.parametrize("name", listed_names())
def test_the_api_page_lists_only_what_is_public(name: str) -> None:
    assert name in PUBLIC


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_are_documented(function: Callable[..., Any]) -> None:
    doc = inspect.getdoc(function) or ""
    signature = inspect.signature(function)
    for section in ("Args:", "Returns:", "Example", ">>> "):
        if not (section == "Returns:" and signature.return_annotation is None):
            assert section in doc
    arguments = doc.partition("Args:")[2].partition("Returns:")[0]
    for name in signature.parameters:
        assert f"{name}:" in arguments


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_are_annotated(function: Callable[..., Any]) -> None:
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_classes_are_documented(cls: type) -> None:
    assert "__doc__" in vars(cls)
    # A dataclass without a docstring gets its signature for one.
    assert cls.__doc__
    assert not cls.__doc__.startswith(f"{cls.__name__}(")
    # Exceptions and warnings are raised by what documents them.
    if not issubclass(cls, BaseException):
        assert ">>> " in (inspect.getdoc(SHOWN_BY.get(cls.__name__, cls)) or "")
    for name, member in vars(cls).items():
        if isinstance(member, property) and not name.startswith("_"):
            assert member.__doc__


@pytest.mark.parametrize("name", ["close", "delete_after", "restore", "save", "wait"])
def test_methods_are_documented(name: str) -> None:
    method = getattr(TrainingCheckpoints, name)
    doc = inspect.getdoc(method) or ""
    for parameter in inspect.signature(method).parameters:
        assert parameter == "self" or f"{parameter}: " in doc.partition("Args:")[2]
    assert "Raises:" in doc


def test_options_are_keyword_only() -> None:
    """A position says little of a rank or a path; two positions are what a reader can hold."""
    for name, function in FUNCTIONS.items():
        positional = [
            parameter
            for parameter in inspect.signature(function).parameters.values()
            if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        ]
        # An initialiser is called by position, with all that it needs. The others named here take
        # more than one thing by itself, and then `targets` as `wrap` does.
        limits = {"blend": 3, "extract": 3}
        limit = 4 if name.startswith("lora_jax.init.") else limits.get(name.rpartition(".")[2], 2)
        assert len(positional) <= limit, name


def test_what_the_package_offers_is_what_its_modules_define() -> None:
    assert lora_jax.save is lora_jax.checkpoint.save
    assert lora_jax.adapt is lora_jax.transform.adapt
    assert lora_jax.CheckpointError is lora_jax.checkpoint.CheckpointError
