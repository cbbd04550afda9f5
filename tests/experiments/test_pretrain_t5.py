"""Pretraining a tiny T5: what it writes, that it goes on, that it is fine-tuned, and errors."""

import json

import numpy as np
import pytest

from experiments import llm_lora, pretrain_t5
from experiments.llm import training
from experiments.models.pretrained import LanguageModel
from tests.experiments.conftest import promotion_of_users
from tests.experiments.interruptions import interrupted_after

for module in ("safetensors", "tokenizers"):
    pytest.importorskip(module)

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
SMALL = [
    *("--vocabulary", "22", "--width", "16", "--hidden", "24", "--layers", "1", "--heads", "2"),
    *("--texts", "24", "--held-out", "4", "--max-length", "48", "--epochs", "8"),
    *("--batch-size", "2", "--evaluate-every", "20", "--learning-rate", "0.02"),
]


@pytest.fixture(scope="module", autouse=True)
def dialogues(tmp_path_factory):
    """Writes dialogues that count up: what is missing can be told."""
    folder = tmp_path_factory.mktemp("dialogsum")
    random = np.random.default_rng(0)
    for part, count in (("train", 24), ("dev", 6)):
        starts = random.integers(0, len(WORDS), count)
        entries = [
            {"dialogue": " ".join(WORDS[(start + k) % 10] for k in range(20)), "summary": "they"}
            for start in starts
        ]
        (folder / f"dialogsum.{part}.jsonl").write_text("\n".join(map(json.dumps, entries)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIALOGSUM_DIR", str(folder))
        yield


@pytest.fixture(scope="module")
def out(dialogues, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    with promotion_of_users():
        assert pretrain_t5.main([*SMALL, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def metrics(out):
    return json.loads((out / "metrics.json").read_text())


def test_gaps_are_filled_better(out, metrics):
    held_out = metrics["held_out"]
    assert held_out["best"]["loss"] < 0.7 * held_out["before"]["loss"]
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_folder_is_a_model_with_its_tokenizer(out):
    model = LanguageModel.read(out / "model")
    tokenizer = model.tokenizer()
    assert model.config.vocab_size == 122
    assert tokenizer.largest_id == 121
    tokens = tokenizer.encoded("seven eight", ends=True)
    assert tokens[-1] == tokenizer.end_ids[0] == 1
    assert tokenizer.decoded(tokens) == "seven eight"
    assert tokenizer.encoded("<extra_id_0><extra_id_99>").tolist() == [121, 22]
    assert np.isfinite(np.asarray(model.params()["embed"]["embedding"])).all()


def test_transformers_reads_the_folder(out):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    own = LanguageModel.read(out / "model").tokenizer().encoded("one two nine", ends=True)
    assert tokenizer("one two nine").input_ids == own.tolist()
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(out / "model")
    assert loaded.config.d_model == 16


def test_it_is_fine_tuned(out, tmp_path):
    options = ["--data", "dialogsum", "--validation-examples", "4", "--max-length", "48"]
    model = ["--model", str(out / "model"), "--epochs", "3", "--no-plots", "--out", str(tmp_path)]
    assert llm_lora.main([*options, *model]) == 0
    held_out = json.loads((tmp_path / "metrics.json").read_text())["held_out"]
    assert held_out["on"]["loss"] < held_out["off"]["loss"]


def test_an_interrupted_run_ends_as_an_unbroken_one(out, metrics, tmp_path, monkeypatch, error_of):
    options = [*SMALL, "--no-plots", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        interrupted_after(training.Training, 5, patch)
        assert pretrain_t5.main(options) == 130
    other = error_of(pretrain_t5.main, [*options, "--width", "32", "--resume"])
    assert "--resume continues a model of another size" in other
    assert pretrain_t5.main([*options, "--resume"]) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["evaluations"] == metrics["evaluations"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--texts", "25"], "--texts is 25, and there are 24 dialogues"),
        (["--held-out", "7"], "--held-out is 7, and there are 6 dialogues"),
        (["--heads", "3"], "--width 16 is not a multiple of --heads 3"),
        (["--vocabulary", "5000"], "--vocabulary is 5000, and the texts give"),
        (["--resume"], "--resume finds no checkpoint"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input(tmp_path, error_of, options, message):
    assert message in error_of(pretrain_t5.main, [*SMALL, *options, "--out", str(tmp_path)])
