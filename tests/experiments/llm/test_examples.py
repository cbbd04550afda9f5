"""Files of examples: what is read, and what is refused."""

import gzip
import json

import pytest

from experiments.common.errors import InputError
from experiments.llm.examples import read_examples, read_preferences

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "hi"},
]


def written(tmp_path, *lines, name="examples.jsonl"):
    path = tmp_path / name
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize("name", ["examples.jsonl", "examples.jsonl.gz"])
def test_both_forms_are_read(tmp_path, name):
    path = written(
        tmp_path, {"messages": CONVERSATION}, "", {"prompt": "a", "completion": "b"}, name=name
    )
    first, second = read_examples(path)
    assert [message["content"] for message in first.messages][1] == "Hello"
    assert (second.prompt, second.completion) == ("a", "b")
    assert second.where == f"{path}, line 3"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", r"line 2 is \[1\]; expected an object with `messages`"),
        ({"text": "a"}, "line 2 has the keys text; expected"),
        ({"prompt": "a", "completion": ""}, "line 2 has an empty `completion`"),
        ({"prompt": 1, "completion": "b"}, "line 2 has the keys prompt, completion"),
        ({"messages": []}, r"line 2: `messages` is \[\]; expected a list"),
        ({"messages": [{"role": "user"}]}, "line 2: a message is"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "line 2: a message is"),
        ({"messages": CONVERSATION[:2]}, "line 2: the last message is of 'user'"),
    ],
)
def test_lines_that_are_no_examples(tmp_path, line, message):
    with pytest.raises(InputError, match=message):
        read_examples(written(tmp_path, {"prompt": "a", "completion": "b"}, line))


def test_files_that_hold_none(tmp_path):
    with pytest.raises(InputError, match="has no examples"):
        read_examples(written(tmp_path, ""))
    with pytest.raises(InputError, match="can't be read"):
        read_examples(tmp_path / "nothing.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="can't be read"):
        read_examples(tmp_path / "binary.jsonl")


def test_preferences_are_two_conversations(tmp_path):
    question = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    path = written(
        tmp_path,
        {"prompt": "hello", "chosen": "the world", "rejected": "no"},
        {"prompt": question, "chosen": "hi", "rejected": "the other"},
    )
    first, second = read_preferences(path)
    assert [each["content"] for each in first.chosen.messages] == ["hello", "the world"]
    assert [each["content"] for each in second.rejected.messages][-1] == "the other"


@pytest.mark.parametrize(
    "entry",
    [
        {"prompt": "a", "chosen": "b"},
        {"prompt": 3, "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": ["b"], "rejected": "c"},
    ],
)
def test_lines_that_are_no_preferences(tmp_path, entry):
    with pytest.raises(InputError, match="line 1 has the keys .*; expected an object with"):
        read_preferences(written(tmp_path, entry))
    with pytest.raises(InputError, match="has no preferences"):
        read_preferences(written(tmp_path, ""))
