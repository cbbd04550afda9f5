"""Where the sentences come from: two files, or a data set by its name."""

from pathlib import Path

from experiments.console import Console
from experiments.data.mnist import default_data_dir
from experiments.data.text import TextDataset
from experiments.data.tsv import read_texts
from experiments.errors import InputError

GLUE_SST2 = "glue/sst2"

_TWO_WAYS = (
    "there are two ways to other data: (1) run where there is a network, and it is downloaded "
    "once; (2) pass --train-file and --eval-file, two files with lines of sentence, tab, label"
)


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
      eval_file: what to test on, with no other labels.
      data: `"glue/sst2"`, from TensorFlow Datasets, in place of the files.
      data_dir: where prepared data sets are; TFDS's own folder unless given.
      console: what is being done is told here.
      header: whether the files' first line is a header; by its content unless given.
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
        raise InputError(f"--data {name} can't be had ({error}); {_TWO_WAYS}") from error
