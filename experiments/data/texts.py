"""Sentences with a class each, from two files or from a data set by its name.

A file has a sentence, a tab and a label in each line. Quotes and backslashes are part of the
sentence: nothing is escaped, so neither tabs nor line breaks can be inside one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.common.console import Console
from experiments.common.errors import InputError
from experiments.data.dataset import TextDataset, Texts, default_data_dir

GLUE_SST2 = "glue/sst2"

_TWO_WAYS = (
    "there are two ways to get data: (1) run where there is a network, and it is downloaded "
    "once; (2) pass --train-file and --eval-file, two files with lines of sentence, tab, label"
)
_COLUMNS = 2
_LABEL_COLUMN_NAMES = {"label", "labels", "class", "category", "target", "sentiment"}
_SHOWN_CHARACTERS = 60


def load_texts(
    *,
    train_file: Path | None,
    eval_file: Path | None,
    data: str | None,
    data_dir: Path | None,
    console: Console,
    header: bool | None = None,
) -> TextDataset:
    """Returns the sentences of two files, or those of a data set by its name.

    Args:
      train_file: what to train on; its labels are the classes.
      eval_file: what to test on; it has no other labels.
      data: `"glue/sst2"`, from TensorFlow Datasets, in place of the files.
      data_dir: where prepared data sets are; TFDS's own folder if None.
      console: where progress is shown.
      header: whether the first line of a file is a header; its content decides if None.
    """
    if data is not None and (train_file or eval_file):
        raise InputError(f"--data {data} and --train-file or --eval-file exclude each other")
    if data is not None:
        return _by_name(data, data_dir or default_data_dir(), console)
    if train_file is None or eval_file is None:
        missing = "--eval-file" if train_file else "--train-file"
        raise InputError(
            f"{missing} is missing; pass --train-file and --eval-file, or --data {GLUE_SST2}"
        )
    train = read_texts(train_file, header=header)
    test = read_texts(eval_file, classes=train.classes, header=header)
    return TextDataset(train_file.stem, train, test)


def _by_name(name: str, data_dir: Path, console: Console) -> TextDataset:
    if name != GLUE_SST2:
        raise InputError(f"--data is {name!r}, expected {GLUE_SST2!r}; {_TWO_WAYS}")
    # Imported late: TensorFlow Datasets takes a second, and files don't need it.
    from experiments.data import glue_builder

    try:
        return glue_builder.sst2(data_dir, console)
    except OSError as error:
        raise InputError(f"--data {name} is not available ({error}); {_TWO_WAYS}") from error


class _Line(NamedTuple):
    number: int
    sentence: str
    label: str


def read_texts(
    path: Path, *, classes: Sequence[str] | None = None, header: bool | None = None
) -> Texts:
    """Returns the sentences in a file, and their classes: all its labels, sorted.

    Labels that are all whole numbers are sorted as numbers, others as text. The first line is a
    header if its label is a column's name, such as `label`, or the only label that is not a number.

    Args:
      path: the file, in UTF-8.
      classes: the labels that are allowed, in their order; those of the file if None.
      header: whether the first line is a header; its content decides if None.

    Raises:
      InputError: the file can't be read, is empty, has only one class, or has a line that is not
        a sentence, a tab and a label; the line's number is named.
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
                f"{path}, line {line.number}: the label {line.label!r} is not one of the training "
                f"data's: {', '.join(names)}"
            )
    labels = np.array([number_of[line.label] for line in lines], np.int32)
    return Texts(tuple(line.sentence for line in lines), labels, names)


def _lines(path: Path) -> list[_Line]:
    """Returns the lines of the file, without blank ones at its end."""
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
