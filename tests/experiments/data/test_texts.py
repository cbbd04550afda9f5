"""Files of sentences and labels: what is read, what is drawn from it, and what is refused."""

import functools
import os
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest

from experiments.common.errors import InputError
from experiments.data.dataset import Texts, subset
from experiments.data.texts import load_texts, read_texts

SST2_DIR = os.environ.get("SST2_DIR")


def written(folder: Path, content: str | bytes, name: str = "train.tsv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    "header", ["", "sentence\tlabel\n", "text\tSentiment\n", "question\tkind\n"]
)
def test_the_header_is_told_by_its_content(tmp_path, header):
    texts = read_texts(written(tmp_path, f"{header}good film\t1\nbad film \t0\nfine\t1\n"))
    assert texts.sentences == ("good film", "bad film", "fine")
    assert texts.labels.tolist() == [1, 0, 1]
    assert texts.labels.dtype == np.int32
    assert texts.counts() == {"0": 1, "1": 2}


def test_a_header_can_be_asserted_and_denied(tmp_path):
    named = written(tmp_path, "what\twhere\nhere\tyes\nthere\tno\n")
    assert read_texts(named, header=True).classes == ("no", "yes")
    assert read_texts(named).classes == ("no", "where", "yes")
    odd = written(tmp_path, "a film\tclass\nanother\tgenre\n")
    assert read_texts(odd, header=False).classes == ("class", "genre")
    assert read_texts(written(tmp_path, "a\tlabel\nb\tother\nc\tlabel\n")).classes == (
        "label",
        "other",
    )


def test_numbers_are_sorted_as_numbers_and_names_as_text(tmp_path):
    numbers = "".join(f"sentence\t{label}\n" for label in (10, 9, -1, 2))
    assert read_texts(written(tmp_path, numbers)).classes == ("-1", "2", "9", "10")
    names = "".join(f"sentence\t{label}\n" for label in ("b", "10", "9", "a"))
    assert read_texts(written(tmp_path, names), header=False).classes == ("10", "9", "a", "b")


@pytest.mark.parametrize(
    "sentence",
    ['"', '"quoted" at the start', 'say "so', r"back\slash \n", "naïve – ‘film’", "a\u2028b"],
)
def test_nothing_in_a_sentence_is_special(tmp_path, sentence):
    texts = read_texts(written(tmp_path, f"{sentence}\tyes\nother\tno\n"))
    assert texts.sentences == (sentence, "other")


def test_line_ends_and_byte_order_marks_of_windows_are_no_content(tmp_path):
    content = b"\xef\xbb\xbfsentence\tlabel\r\ngood\tyes\r\nbad\tno\r\n\r\n"
    texts = read_texts(written(tmp_path, content))
    assert (texts.sentences, texts.classes) == (("good", "bad"), ("no", "yes"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no tab", "line 3 has no tabs, expected a sentence, one tab and a label; it is 'no tab'"),
        ("two\ttabs\t1", "line 3 has 2 tabs"),
        ("", "line 3 has no tabs"),
        ("\t1", "line 3 has an empty sentence"),
        ("nothing \t ", "line 3 has an empty label"),
        ("long " * 50, r"line 3 .*long \.\.\.'"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(tmp_path, line, message):
    path = written(tmp_path, f"sentence\tlabel\ngood\t1\n{line}\nbad\t0\n")
    with pytest.raises(InputError, match=rf"train\.tsv, {message}"):
        read_texts(path)


def test_other_encodings_are_refused_with_the_line(tmp_path):
    path = written(tmp_path, b"good\t1\nna\xefve\t0\n")
    with pytest.raises(InputError, match=r"train\.tsv, line 2 is not UTF-8 \(byte 3\)"):
        read_texts(path)


@pytest.mark.parametrize("content", ["", "\n", "sentence\tlabel\n"])
def test_a_file_without_examples_is_refused(tmp_path, content):
    with pytest.raises(InputError, match=r"train\.tsv has no examples"):
        read_texts(written(tmp_path, content))


def test_one_class_is_none(tmp_path):
    with pytest.raises(InputError, match="every label is '1'; a classifier needs two"):
        read_texts(written(tmp_path, "good\t1\nfine\t1\n"))


@pytest.mark.parametrize("name", ["nowhere.tsv", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    with pytest.raises(InputError, match="can't be read"):
        read_texts(tmp_path / name)


def texts_of(counts) -> Texts:
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    names = tuple(f"sentence {number}" for number in range(len(labels)))
    return Texts(names, labels, tuple(f"class {label}" for label in range(len(counts))))


@pytest.mark.parametrize("count", [3, 10, 50, 100])
def test_a_subset_keeps_the_shares_of_the_classes(count):
    texts = texts_of((60, 30, 10))
    chosen = subset(texts, count, seed=0)
    assert len(set(chosen.sentences)) == len(chosen) == count
    for label, share in enumerate((0.6, 0.3, 0.1)):
        assert abs((chosen.labels == label).sum() - share * count) <= 1
    rows = [int(sentence.removeprefix("sentence ")) for sentence in chosen.sentences]
    assert np.array_equal(texts.labels[rows], chosen.labels)


def test_a_subset_is_part_of_every_larger_one_and_follows_its_seed():
    texts = texts_of((60, 30))
    small, large, other = (
        set(subset(texts, count, seed=seed).sentences)
        for count, seed in ((20, 0), (40, 0), (20, 1))
    )
    assert small < large
    assert small != other
    assert small == set(subset(texts, 20, seed=0).sentences)


def test_more_than_there_are_can_not_be_drawn():
    with pytest.raises(InputError, match="--train-examples 11 is more than the 10"):
        subset(texts_of((5, 5)), 11, seed=0)


@pytest.fixture
def load(console, tmp_path):
    """Loads texts with nothing but what a test passes, and no network."""
    nothing = {"train_file": None, "eval_file": None, "data": None, "data_dir": tmp_path / "tfds"}
    return functools.partial(load_texts, **nothing, console=console)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)


def test_two_files_share_the_classes_of_the_first(tmp_path, load):
    train = written(tmp_path, "good\tyes\nbad\tno\nso\tperhaps\n")
    evaluation = written(tmp_path, "fine\tyes\nso-so\tperhaps\n", "dev.tsv")
    dataset = load(train_file=train, eval_file=evaluation)
    assert dataset.name == "train"
    assert dataset.classes == dataset.test.classes == ("no", "perhaps", "yes")
    assert dataset.test.labels.tolist() == [2, 1]


def test_a_label_that_training_does_not_have_is_named_with_its_line(tmp_path, load):
    train = written(tmp_path, "good\tyes\nbad\tno\n")
    evaluation = written(tmp_path, "sentence\tlabel\nfine\tyes\nso-so\tperhaps\n", "dev.tsv")
    with pytest.raises(InputError, match=r"dev\.tsv, line 3: the label 'perhaps' .*no, yes"):
        load(train_file=train, eval_file=evaluation)


def test_one_file_alone_is_not_enough(tmp_path, load):
    path = written(tmp_path, "good\tyes\nbad\tno\n")
    with pytest.raises(InputError, match="--eval-file is missing"):
        load(train_file=path)
    with pytest.raises(InputError, match="--train-file is missing"):
        load(eval_file=path)
    with pytest.raises(InputError, match="exclude each other"):
        load(train_file=path, data="glue/sst2")


def test_another_name_is_refused(load):
    with pytest.raises(InputError, match=r"--data is 'glue/cola', expected 'glue/sst2'"):
        load(data="glue/cola")


def test_without_a_network_two_ways_are_named(load):
    with pytest.raises(InputError, match=r"not available .*no network.*\(1\).*\(2\) pass --train"):
        load(data="glue/sst2")


def test_sst2_is_prepared_once_from_its_archive(tmp_path, load, monkeypatch, capfd):
    tfds = pytest.importorskip("tensorflow_datasets")
    archive = tmp_path / "archive"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("SST-2/train.tsv", 'sentence\tlabel\n"good" \t1\nbad \t0\nfine \t1\n')
        file.writestr("SST-2/dev.tsv", "sentence\tlabel\ndull \t0\n")
        file.writestr("SST-2/test.tsv", "index\tsentence\n0\tnobody knows\n")
    monkeypatch.setattr(
        "experiments.data.prepared.urllib.request.urlopen", lambda *_, **__: archive.open()
    )
    monkeypatch.setattr(tfds.download.DownloadManager, "download", lambda *_: archive)
    dataset = load(data="glue/sst2")
    shown = capfd.readouterr()
    assert shown.out == ""
    assert [line.split(",")[0] for line in shown.err.splitlines()] == ["Preparing glue"]
    assert dataset.name == "glue/sst2"
    assert dataset.classes == ("negative", "positive")
    found = dict(zip(dataset.train.sentences, dataset.train.labels.tolist(), strict=True))
    assert found == {'"good"': 1, "bad": 0, "fine": 1}
    assert (dataset.test.sentences, dataset.test.labels.tolist()) == (("dull",), [0])
    archive.unlink()
    assert load(data="glue/sst2").train.sentences == dataset.train.sentences


@pytest.mark.skipif(SST2_DIR is None, reason="SST2_DIR names no folder with SST-2's files")
def test_the_real_files_hold_what_they_should(load):
    folder = Path(SST2_DIR)
    dataset = load(train_file=folder / "train.tsv", eval_file=folder / "test.tsv")
    assert len(dataset.train) == 60_614
    assert dataset.test.counts() == {"0": 428, "1": 444}
    assert len(read_texts(folder / "dev.tsv", classes=dataset.classes)) == 6_735
