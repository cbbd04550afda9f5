"""Examples as tokens: which are read, which are learned, and what is too long."""

import numpy as np
import pytest

from experiments.common.errors import InputError
from experiments.llm.examples import Example, Preference
from experiments.llm.texts import AnsweredTexts, ContinuedTexts, tokenized, tokenized_pairs
from tests.tiny_tokenizer import TEMPLATE, chat_tokenizer

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
def texts():
    return ContinuedTexts(chat_tokenizer())


def learned_text(texts, example, **options):
    (one,) = tokenized([example], texts, max_length=500, **options).examples
    spans, current = [], []
    for token, is_learned in zip(one.tokens, one.learned, strict=True):
        if is_learned:
            current.append(token)
        elif current:
            spans.append(texts.tokenizer.decoded(current))
            current = []
    return [*spans, texts.tokenizer.decoded(current)] if current else spans


def test_answers_are_learned_and_nothing_else(texts):
    example = Example("x", messages=tuple(CONVERSATION))
    assert learned_text(texts, example) == ["hi", "the world"]
    (one,) = tokenized([example], texts, max_length=500).examples
    np.testing.assert_array_equal(
        one.tokens, texts.tokenizer.encoded_conversation(CONVERSATION, answers=False)
    )
    # The end of each answer is learned too, or a model would never stop.
    ends = one.tokens == texts.tokenizer.end_ids[0]
    assert one.learned[ends].tolist() == [False, False, True, False, True]


def test_everything_is_learned_if_asked_for(texts):
    for example in (Example("x", messages=tuple(CONVERSATION)), Example("x", "", "he", "llo")):
        (one,) = tokenized([example], texts, max_length=500, learn_prompts=True).examples
        assert one.learned.all()


def test_a_prompt_and_its_completion(texts):
    example = Example("x", prompt="the world", completion=" hello")
    assert learned_text(texts, example) == [" hello"]
    (one,) = tokenized([example], texts, max_length=500).examples
    assert one.tokens[-1] == texts.tokenizer.end_ids[0]
    assert one.learned[-1]


def test_what_is_too_long_is_counted(texts):
    short = Example("x", prompt="the", completion=" world")
    long = Example("x", prompt="the", completion=" world" * 30)
    hopeless = Example("x", prompt="the " * 30, completion=" world")
    found = tokenized([short, long, hopeless], texts, max_length=20)
    assert (len(found.examples), found.cut, found.dropped) == (2, 1, 1)
    assert max(map(len, found.examples)) == 20
    found = tokenized([short, long, hopeless], texts, max_length=20, drop_long=True)
    assert (len(found.examples), found.cut, found.dropped) == (1, 0, 2)
    with pytest.raises(InputError, match="all 1 examples are longer than 20 tokens"):
        tokenized([hopeless], texts, max_length=20)


def test_a_template_that_hides_what_was_said(texts):
    forgetful = chat_tokenizer("{{ messages[-1]['content'] }}")
    hidden = Example("file, line 7", messages=tuple(CONVERSATION))
    with pytest.raises(InputError, match=r"file, line 7: the chat template changes .*--learn-pro"):
        tokenized([hidden], ContinuedTexts(forgetful), max_length=99)
    # As the error says, all of such a text can be learned.
    (one,) = tokenized(
        [hidden], ContinuedTexts(forgetful), max_length=99, learn_prompts=True
    ).examples
    assert texts.tokenizer.decoded(one.tokens) == CONVERSATION[-1]["content"]
    assert one.learned.all()


def pair(question, chosen, rejected):
    asked = {"role": "user", "content": question}
    return Preference(
        *(
            Example("x", messages=(asked, {"role": "assistant", "content": answer}))
            for answer in (chosen, rejected)
        )
    )


def test_the_chosen_answer_comes_before_the_rejected_one(texts):
    found = tokenized_pairs(
        [pair("a", "the world", "no"), pair("b", "hi", "the other")], texts, max_length=500
    )
    learned = [texts.tokenizer.decoded(each.tokens[each.learned]) for each in found.examples]
    assert learned == ["the world", "no", "hi", "the other"]


def test_a_pair_is_kept_or_left_out_as_one(texts):
    pairs = [
        pair("hello", "the", "the " * 30),
        pair("hello " * 30, "a", "b"),
        pair("hello", "a", "b"),
    ]
    found = tokenized_pairs(pairs, texts, max_length=20)
    assert (len(found.examples), found.cut, found.dropped) == (4, 1, 1)
    found = tokenized_pairs(pairs, texts, max_length=20, drop_long=True)
    assert (len(found.examples), found.cut, found.dropped) == (2, 0, 2)
    with pytest.raises(InputError, match="all 1 pairs are longer than 20 tokens"):
        tokenized_pairs(pairs[1:2], texts, max_length=20)


# --- encoder-decoders ----------------------------------------------------------------------------

START = 7


@pytest.fixture(params=[TEMPLATE, None], ids=["template", "plain"])
def answered(request):
    return AnsweredTexts(chat_tokenizer(request.param, ends_texts=True), START)


def test_an_encoder_reads_what_was_asked_and_the_decoder_writes_the_answer(answered):
    one = answered.example(Example("x", messages=tuple(CONVERSATION)))
    tokenizer = answered.tokenizer
    end = tokenizer.end_ids[0]
    assert (one.tokens[0], one.tokens[-1], one.source[-1]) == (START, end, end)
    assert one.learned.tolist() == [False] + [True] * (len(one.tokens) - 1)
    assert tokenizer.decoded(one.tokens[1:]) == "the world"
    np.testing.assert_array_equal(one.source, answered.question(CONVERSATION[:-1]))
    read = tokenizer.decoded(one.source)
    if tokenizer.has_template:
        assert read == "<|system|>Be brief.Hellohiworld?"
    else:
        assert read == "Be brief.\nHello\nhi\nworld?"


def test_an_encoder_reads_a_prompt(answered):
    one = answered.example(Example("x", prompt="the world", completion="hello"))
    np.testing.assert_array_equal(one.source, answered.prompt("the world"))
    assert answered.tokenizer.decoded(one.source) == "the world"
    assert answered.tokenizer.decoded(one.tokens[1:]) == "hello"


def test_a_source_that_is_cut_keeps_its_end(answered):
    long = Example("x", prompt="the " * 30, completion="world")
    found = tokenized([long], answered, max_length=20)
    (one,) = found.examples
    assert (len(one), len(one.source), found.cut) == (20, 20, 1)
    assert one.source[-1] == answered.tokenizer.end_ids[0]
    assert answered.tokenizer.decoded(one.tokens[1:]) == "world"
    found = tokenized(
        [long, Example("x", "", "the", "other")], answered, max_length=20, drop_long=True
    )
    assert (len(found.examples), found.dropped) == (1, 1)


def test_an_encoder_decoder_learns_no_prompts(answered):
    with pytest.raises(InputError, match="--learn-prompts goes with a model that continues texts"):
        answered.example(Example("x", "", "a", "b"), learn_prompts=True)
