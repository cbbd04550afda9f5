"""A Markdown extension that shows blank lines where a doctest has to write `<BLANKLINE>`."""

from markdown import Markdown
from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor


class BlankLines(Extension):
    """Replaces the marker of doctests in a document."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Registers the replacement."""
        md.preprocessors.register(_BlankLines(md), "blank-lines", 40)


def makeExtension() -> BlankLines:
    """Returns the extension: what Markdown calls when a configuration names this module."""
    return BlankLines()


class _BlankLines(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        return ["" if line.strip() == "<BLANKLINE>" else line for line in lines]
