"""Links between documents lead to files, and those of the site's pages stay in the site."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    path for folder in ("", "docs", "benchmarks") for path in sorted((ROOT / folder).glob("*.md"))
]
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_link_leads_to_a_file(path):
    for name in LINK.findall(path.read_text(encoding="utf-8")):
        target = (path.parent / name).resolve()
        assert target.exists(), name
        if path.parent.name == "docs":
            assert target.is_relative_to(path.parent), f"{name} is not in the site"
