r"""A Markdown extension that writes formulas as MathML, which browsers show without a script.

`$...$` stands in a line, and a paragraph of `$$...$$` on a line of its own, in pages and docstrings
alike. A formula that can't be translated stops the build.

>>> import markdown
>>> markdown.markdown(r"The scale is $\alpha / r$.", extensions=[MathML()])
'<p>The scale is <math ...</math>.</p>'
"""

import re
from xml.etree import ElementTree

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.blockprocessors import BlockProcessor
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor

# As in Pandoc: no space inside of the dollars, and no digit after them, so that "$5 or $6" is text.
_IN_LINE = r"(?<![\\$])\$(?![\s$])((?:\\.|[^\\$])+?)(?<!\s)\$(?![\d$])"
_ON_ITS_OWN = re.compile(r"\s*\$\$(.+)\$\$\s*", re.DOTALL)

_BEFORE_ESCAPES = 189.9  # after the pattern for `code`, whose priority is 190


class MathML(Extension):
    """Translates the formulas of a Markdown document."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Registers the two patterns."""
        md.inlinePatterns.register(_InLine(_IN_LINE, md), "mathml-inline", _BEFORE_ESCAPES)
        md.parser.blockprocessors.register(_OnItsOwn(md.parser), "mathml-block", 79.9)


def makeExtension() -> MathML:
    """Returns the extension: what Markdown calls when a configuration names this module."""
    return MathML()


def mathml(latex: str, display: str) -> str:
    r"""Returns a formula as MathML.

    Raises:
      ValueError: it holds a command that is not translated, or can't be read.

    >>> mathml(r"\alpha", "inline")
    '<math ... display="inline"><mrow><mi>&#x003B1;</mi></mrow></math>'
    >>> mathml(r"\unheardof", "inline")
    Traceback (most recent call last):
    ValueError: the formula '\\unheardof' holds a command that latex2mathml does not know
    """
    formula = convert(" ".join(latex.split()), display=display)
    if "\\" in formula:
        raise ValueError(f"the formula {latex!r} holds a command that latex2mathml does not know")
    return formula


class _InLine(InlineProcessor):
    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:
        return self.md.htmlStash.store(mathml(m[1], "inline")), m.start(0), m.end(0)


class _OnItsOwn(BlockProcessor):
    def test(self, parent: ElementTree.Element, block: str) -> bool:
        return _ON_ITS_OWN.fullmatch(block) is not None

    def run(self, parent: ElementTree.Element, blocks: list[str]) -> None:
        match = _ON_ITS_OWN.fullmatch(blocks.pop(0))
        assert match is not None  # `test` said so
        placeholder = self.parser.md.htmlStash.store(mathml(match[1], "block"))
        ElementTree.SubElement(parent, "p", {"class": "formula"}).text = placeholder
