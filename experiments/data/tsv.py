"""Tab-separated files of sentences and their classes.

A line is a sentence, a tab and a label. Quotes and backslashes are part of the sentence: nothing is
escaped, so neither tabs nor line breaks can be inside one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.data.text import Texts
from experiments.errors import InputError

_COLUMNS = 2
_LABEL_COLUMN_NAMES = {"label", "labels", "class", "category", "target", "sentiment"}
_SHOWN_CHARACTERS = 60


class _Line(NamedTuple):
    number: int
    sentence: str
    label: str


def read_texts(
    path: Path, *, classes: Sequence[str] | None = None, header: bool | None = None
) -> Texts:
    """Returns the sentences in a file, and their classes: all its labels, sorted.

    Labels that are all whole numbers are sorted as numbers, others as text. The first line is a
    header if its label is the name of a column, such as `label`, or the only one that is not a
    number.

    Args:
      path: the file, in UTF-8.
      classes: the only labels that are allowed, in their order; those in the file unless given.
      header: whether the first line is one; by its content unless given.

    Raises:
      InputError: the file can't be read, is empty, has but one class, or has a line that is not a
        sentence, a tab and a label; its number is named.
    """
    lines = _lines(path)
    if lines and (_is_header(lines) if header is None else header):
        lines = lines[1:]
    if not lines:
        raise InputError(f"{path} has no examples; expected lines of sentence, tab, label")
    names = _sorted_labels(path, lines) if classes is None else tuple(classes)
    number_of = {name: number for number, name in enumerate(names)}
    for line in lines:
        if line.label not in number_of:
            raise InputError(
                f"{path}, line {line.number}: the label {line.label!r} is none of the training "
                f"data's: {', '.join(names)}"
            )
    labels = np.array([number_of[line.label] for line in lines], np.int32)
    return Texts(tuple(line.sentence for line in lines), labels, names)


def _lines(path: Path) -> list[_Line]:
    """Returns the lines of the file; blank ones at its end do not count."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror or error})") from error
    rows = content.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n").split(b"\n")
    if rows == [b""]:
        return []
    return [_line(path, number, row) for number, row in enumerate(rows, start=1)]


def _line(path: Path, number: int, row: bytes) -> _Line:
    try:
        text = row.decode("utf-8").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, line {number} is not UTF-8 (byte {error.start + 1}); convert the file"
        ) from error
    columns = [column.strip() for column in text.split("\t")]
    if len(columns) != _COLUMNS:
        tabs = len(columns) - 1
        raise _malformed(path, number, f"{tabs or 'no'} tab{'s' * (tabs != 1)}", text)
    for name, column in zip(("sentence", "label"), columns, strict=True):
        if not column:
            raise _malformed(path, number, f"an empty {name}", text)
    return _Line(number, *columns)


def _malformed(path: Path, number: int, found: str, text: str) -> InputError:
    shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
    return InputError(
        f"{path}, line {number} has {found}, expected a sentence, one tab and a label; "
        f"it is {shown!r}"
    )


def _is_header(lines: Sequence[_Line]) -> bool:
    first, others = lines[0].label, {line.label for line in lines[1:]}
    if first in others:
        return False
    is_odd = not _is_number(first) and bool(others) and all(map(_is_number, others))
    return is_odd or first.lower() in _LABEL_COLUMN_NAMES


def _sorted_labels(path: Path, lines: Sequence[_Line]) -> tuple[str, ...]:
    labels = {line.label for line in lines}
    if len(labels) == 1:
        raise InputError(
            f"{path}: every label is {labels.pop()!r}; a classifier needs two classes or more"
        )
    return tuple(sorted(labels, key=int if all(map(_is_number, labels)) else None))


def _is_number(label: str) -> bool:
    return label.isascii() and label.removeprefix("-").isdigit()
