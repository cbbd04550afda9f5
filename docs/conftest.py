"""Leaves the Markdown extensions of the site out of the tests where its packages are missing."""

import importlib.util

SITE = ("latex2mathml", "markdown")
collect_ignore = [] if all(map(importlib.util.find_spec, SITE)) else ["blank_lines.py", "mathml.py"]
