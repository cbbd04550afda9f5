"""Files of examples: what is read, which tokens are learned, and what is refused."""

import gzip
import json

import numpy as np
import pytest

from experiments.common.errors import InputError
from experiments.llm.examples import (
    Example,
    read_examples,
    read_preferences,
    tokenized,
    tokenized_pairs,
)
from tests.tiny_tokenizer import chat_tokenizer

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "world?"},
    {"role": "assistant", "content": "the world"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


def written(tmp_path, *lines, name="examples.jsonl"):
    path = tmp_path / name
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def learned_text(tokenizer, example, **options):
    (one,) = tokenized([example], tokenizer, max_length=500, **options).examples
    spans, current = [], []
    for token, is_learned in zip(one.tokens, one.learned, strict=True):
        if is_learned:
            current.append(token)
        elif current:
            spans.append(tokenizer.decoded(current))
            current = []
    return [*spans, tokenizer.decoded(current)] if current else spans


@pytest.mark.parametrize("name", ["examples.jsonl", "examples.jsonl.gz"])
def test_both_forms_are_read(tmp_path, name):
    path = written(
        tmp_path, {"messages": CONVERSATION}, "", {"prompt": "a", "completion": "b"}, name=name
    )
    first, second = read_examples(path)
    assert [message["content"] for message in first.messages][1] == "Hello"
    assert (second.prompt, second.completion) == ("a", "b")
    assert second.where == f"{path}, line 3"


def test_answers_are_learned_and_nothing_else(tokenizer):
    example = Example("x", messages=tuple(CONVERSATION))
    assert learned_text(tokenizer, example) == ["hi", "the world"]
    (one,) = tokenized([example], tokenizer, max_length=500).examples
    np.testing.assert_array_equal(
        one.tokens, tokenizer.encoded_conversation(CONVERSATION, answers=False)
    )
    # The end of each answer is learned too, or a model would never stop.
    ends = one.tokens == tokenizer.end_ids[0]
    assert one.learned[ends].tolist() == [False, False, True, False, True]


def test_everything_is_learned_if_asked_for(tokenizer):
    for example in (Example("x", messages=tuple(CONVERSATION)), Example("x", "", "he", "llo")):
        (one,) = tokenized([example], tokenizer, max_length=500, learn_prompts=True).examples
        assert one.learned.all()


def test_a_prompt_and_its_completion(tokenizer):
    example = Example("x", prompt="the world", completion=" hello")
    assert learned_text(tokenizer, example) == [" hello"]
    (one,) = tokenized([example], tokenizer, max_length=500).examples
    assert one.tokens[-1] == tokenizer.end_ids[0]
    assert one.learned[-1]


def test_what_is_too_long_is_counted(tokenizer):
    short = Example("x", prompt="the", completion=" world")
    long = Example("x", prompt="the", completion=" world" * 30)
    hopeless = Example("x", prompt="the " * 30, completion=" world")
    found = tokenized([short, long, hopeless], tokenizer, max_length=20)
    assert (len(found.examples), found.cut, found.dropped) == (2, 1, 1)
    assert max(map(len, found.examples)) == 20
    found = tokenized([short, long, hopeless], tokenizer, max_length=20, drop_long=True)
    assert (len(found.examples), found.cut, found.dropped) == (1, 0, 2)
    with pytest.raises(InputError, match="all 1 examples are longer than 20 tokens"):
        tokenized([hopeless], tokenizer, max_length=20)


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


def test_a_template_that_hides_what_was_said(tokenizer):
    forgetful = chat_tokenizer("{{ messages[-1]['content'] }}")
    hidden = Example("file, line 7", messages=tuple(CONVERSATION))
    with pytest.raises(InputError, match=r"file, line 7: the chat template changes .*--learn-pro"):
        tokenized([hidden], forgetful, max_length=99)
    # As the error says, all of such a text can be learned.
    (one,) = tokenized([hidden], forgetful, max_length=99, learn_prompts=True).examples
    assert tokenizer.decoded(one.tokens) == CONVERSATION[-1]["content"]
    assert one.learned.all()


# --- preferences ---------------------------------------------------------------------------------


def test_preferences_are_two_conversations(tmp_path, tokenizer):
    question = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    path = written(
        tmp_path,
        {"prompt": "hello", "chosen": "the world", "rejected": "no"},
        {"prompt": question, "chosen": "hi", "rejected": "the other"},
    )
    first, second = read_preferences(path)
    assert [each["content"] for each in first.chosen.messages] == ["hello", "the world"]
    assert [each["content"] for each in second.rejected.messages][-1] == "the other"
    found = tokenized_pairs([first, second], tokenizer, max_length=500)
    texts = [tokenizer.decoded(example.tokens[example.learned]) for example in found.examples]
    assert texts == ["the world", "no", "hi", "the other"]


def test_a_pair_is_kept_or_left_out_as_one(tmp_path, tokenizer):
    path = written(
        tmp_path,
        {"prompt": "hello", "chosen": "the", "rejected": "the " * 30},
        {"prompt": "hello " * 30, "chosen": "a", "rejected": "b"},
        {"prompt": "hello", "chosen": "a", "rejected": "b"},
    )
    pairs = read_preferences(path)
    found = tokenized_pairs(pairs, tokenizer, max_length=20)
    assert (len(found.examples), found.cut, found.dropped) == (4, 1, 1)
    found = tokenized_pairs(pairs, tokenizer, max_length=20, drop_long=True)
    assert (len(found.examples), found.cut, found.dropped) == (2, 0, 2)
    with pytest.raises(InputError, match="all 1 pairs are longer than 20 tokens"):
        tokenized_pairs(pairs[1:2], tokenizer, max_length=20)


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
