"""The documentation: every page is in the navigation, and every link leads somewhere."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def pages_of(navigation: list) -> Iterator[str]:
    for entry in navigation:
        for target in entry.values():
            yield from [target] if isinstance(target, str) else pages_of(target)


def test_the_navigation_holds_every_page():
    config = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))
    pages = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    assert sorted(pages_of(config["project"]["nav"])) == sorted(pages)


@pytest.mark.parametrize(
    "page", [*DOCS.glob("*.md"), ROOT / "README.md"], ids=lambda page: page.name
)
def test_pictures_and_linked_files_are_there(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize(
    "page", [*DOCS.glob("*.md"), ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name
)
def test_files_that_are_named_are_there(page):
    """`experiments/NAME.py` stands for a file to come."""
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:docs|experiments|lora_jax|tests)/[\w./-]+)`", text):
        assert "NAME" in name or (ROOT / name).exists(), name


def test_the_code_that_the_extend_page_shows_is_the_code():
    page = (DOCS / "extend.md").read_text(encoding="utf-8")
    files = [*(ROOT / "lora_jax").rglob("*.py"), *(ROOT / "tests" / "cases").rglob("*.py")]
    code = "\n".join(file.read_text(encoding="utf-8") for file in files)
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert blocks
    for block in blocks:
        assert block in code
