"""DialogSum (Chen et al., 2021): dialogues and summaries of them, as conversations."""

import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.common.errors import InputError
from experiments.common.files import atomic_path
from experiments.common.programs import kept_files
from experiments.llm.examples import Example, read_lines

NAME = "dialogsum"
_FOLDER = "DIALOGSUM_DIR"
# Where the authors publish it.
_ADDRESS = "https://raw.githubusercontent.com/cylnlp/dialogsum/main/DialogSum_Data"
_SECONDS = 60
_INSTRUCTION = "Summarize the following dialogue.\n\n"
# The test file has three summaries of each dialogue.
_SUMMARIES = ("summary", "summary1", "summary2", "summary3")


@dataclass(frozen=True)
class Dialogue:
    """A dialogue with the summaries that people wrote of it."""

    text: str
    summaries: tuple[str, ...]
    where: str

    @property
    def question(self) -> dict[str, str]:
        """What a model is asked."""
        return {"role": "user", "content": f"{_INSTRUCTION}{self.text}"}

    @property
    def example(self) -> Example:
        """The dialogue with its first summary, to learn from."""
        answer = {"role": "assistant", "content": self.summaries[0]}
        return Example(self.where, messages=(self.question, answer))


def dialogues(part: str) -> list[Dialogue]:
    """Returns the dialogues of a part: `train`, `dev` or `test`.

    They are read from the folder that `DIALOGSUM_DIR` names; where it is not set, the file of the
    authors is downloaded once, and kept.

    Raises:
      InputError: the folder has no such file, it can't be downloaded, or it is damaged.
    """
    folder = os.environ.get(_FOLDER)
    path = _in_folder(Path(folder), part) if folder else _downloaded(part)
    return [_dialogue(entry, where) for entry, where in read_lines(path)]


def _in_folder(folder: Path, part: str) -> Path:
    names = (f"{NAME}.{part}.jsonl", f"{NAME}.{part}.jsonl.gz")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{_FOLDER} {folder} has neither {' nor '.join(names)}")


def _downloaded(part: str) -> Path:
    """Returns the file of a part, which is downloaded unless an earlier run has kept it."""
    name = f"{NAME}.{part}.jsonl"
    path = kept_files() / NAME / name
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(f"{_ADDRESS}/{name}", timeout=_SECONDS) as answer:
            content = answer.read()
    except OSError as error:
        raise InputError(
            f"{_ADDRESS}/{name} can't be downloaded ({error}); set {_FOLDER} to a folder that "
            f"holds {name}"
        ) from error
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return path


def _dialogue(entry: dict[str, Any], where: str) -> Dialogue:
    text = entry.get("dialogue")
    summaries = tuple(entry[name] for name in _SUMMARIES if isinstance(entry.get(name), str))
    if not isinstance(text, str) or not summaries:
        raise InputError(
            f"{where} has the keys {', '.join(entry) or 'none'}; expected `dialogue` and `summary`"
        )
    return Dialogue(text, summaries, where)
