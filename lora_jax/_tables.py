"""Tables as plain text."""

from collections.abc import Collection, Sequence


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[str] = ()
) -> str:
    """Returns rows of cells under a header, columns aligned; those in `right` to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    rule = ["-" * width for width in widths]
    return "\n".join(_line(cells, widths, header, right) for cells in (header, rule, *rows))


def _line(
    cells: Sequence[str], widths: Sequence[int], header: Sequence[str], right: Collection[str]
) -> str:
    aligned = [
        cell.rjust(width) if name in right else cell.ljust(width)
        for cell, width, name in zip(cells, widths, header, strict=True)
    ]
    return "  ".join(aligned).rstrip()
