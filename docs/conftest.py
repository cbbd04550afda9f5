"""Leaves the site's Markdown extension out of the tests where the site's packages are missing."""

import importlib.util

SITE = ("latex2mathml", "markdown")
collect_ignore = [] if all(map(importlib.util.find_spec, SITE)) else ["mathml.py"]
