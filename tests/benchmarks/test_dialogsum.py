"""The grid on DialogSum, small: what a cell runs and stores, what the tables say of it."""

import dataclasses
import json
import re

import jax
import pytest

from benchmarks.dialogsum import __main__, computing
from benchmarks.dialogsum.cells import GRIDS, Cell, best_rate
from benchmarks.dialogsum.computing import Workplace
from benchmarks.dialogsum.report import tables
from benchmarks.stored import ResultStore
from tests.experiments.small_llm_study import write_model

SMALL = Cell(
    "small",
    "LoRA, rank 2",
    ("--rank", "2", "--max-length", "48", "--learning-rate", "0.02", "--validation-examples", "4"),
    examples=8,
    answers=3,
)


@pytest.fixture
def study(tmp_path, monkeypatch, promoted_ranks):
    """Returns a tiny model, with dialogues in a folder."""
    write_model(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    longer = {**json.loads(config.read_text()), "max_position_embeddings": 256}
    config.write_text(json.dumps(longer))
    entry = {"dialogue": "hello", "summary": "the world"}
    asked = {"dialogue": "hello", "summary1": "the world", "summary2": "world"}
    for part, line, count in (("train", entry, 12), ("dev", entry, 6), ("test", asked, 4)):
        path = tmp_path / "data" / f"dialogsum.{part}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join([json.dumps(line)] * count))
    monkeypatch.setenv("DIALOGSUM_DIR", str(tmp_path / "data"))
    return tmp_path / "model"


@pytest.fixture
def workplace(study, tmp_path):
    return Workplace(tmp_path / "work", ResultStore(tmp_path / "results"), study, ("--no-plots",))


def metrics_of(method, rate, loss):
    return {"training": {"training": {"learning_rate": rate}, "best": {"loss": loss}}}


def test_the_best_rate_is_that_of_the_least_loss():
    found = {"a": metrics_of("full", 1e-4, 2.0), "b": metrics_of("full", 3e-4, 1.5)}
    assert best_rate(found, ("a", "b")) == 3e-4
    cell = Cell("c", "", ("--method", "full"), search=("a", "b"))
    assert cell.training_options(found)[-2:] == ["--learning-rate", "0.0003"]


@pytest.mark.parametrize("grid", GRIDS)
def test_a_search_comes_before_what_it_decides(grid):
    cells = GRIDS[grid].cells
    names = list(cells)
    for place, cell in enumerate(cells.values()):
        assert all(names.index(name) < place for name in cell.search)


@pytest.mark.slow
def test_a_cell_is_computed_once_and_stored_with_its_commands(workplace, monkeypatch):
    pytest.importorskip("rouge_score")
    workplace.compute(SMALL, {})
    found = workplace.store.load("small")
    assert found["training"]["rank"] == 2
    assert found["training"]["examples"]["train"] == 8
    (scores,) = found["answers"]["rouge_of_each"].values()
    assert found["answers"]["answers"] == len(scores["rouge1"]) == 3
    training, answering = found["commands"]
    assert training.startswith("python -m experiments.llm_lora --data dialogsum")
    assert answering.startswith("python -m experiments.llm_lora evaluate --data dialogsum")
    # A training that has ended is not repeated where its answers are missing.
    commands = []
    run = computing._metrics_of
    monkeypatch.setattr(
        computing, "_metrics_of", lambda options, out: commands.append(options) or run(options, out)
    )
    workplace.compute(SMALL, {})
    assert [command[0] for command in commands] == ["evaluate"]


def test_the_model_as_it_is_is_the_one_that_was_chosen(workplace, monkeypatch):
    metrics = dict.fromkeys(computing._KEPT_OF_ANSWERS, 0)
    commands = []
    monkeypatch.setattr(
        computing, "_metrics_of", lambda options, out: commands.append(options) or metrics
    )
    workplace.compute(Cell("base", "", None, answers=3), {})
    ((*_, option, model, _, _),) = commands
    assert (option, model) == ("--model", str(workplace.model))


@pytest.mark.slow
def test_a_training_that_was_interrupted_goes_on(workplace, monkeypatch):
    out = workplace.folder / "small"
    (out / "checkpoints" / "3").mkdir(parents=True)
    asked = []
    monkeypatch.setattr(computing, "_metrics_of", lambda options, out: asked.append(options) or {})
    workplace._trained(["--rank", "2"], out)
    (out / "checkpoints" / "3").rmdir()
    workplace._trained(["--rank", "2"], out)
    assert asked == [["--rank", "2", "--resume"], ["--rank", "2"]]
    assert not out.exists()


def test_what_fails_is_said_and_stores_nothing(workplace):
    broken = Cell("broken", "", ("--rank", "0"), examples=8, answers=0)
    with pytest.raises(RuntimeError, match="--rank 0 .* ended with 2"):
        workplace.compute(broken, {})
    assert workplace.store.load("broken") is None


@pytest.mark.slow
def test_methods_take_steps_in_turns(study, tmp_path, monkeypatch, capsys):
    cells = (
        Cell("base", "", None),
        Cell("lora-8", "LoRA", ("--rank", "2")),
        Cell("again", "", ("--rank", "2", "--seed", "1")),
        Cell("full", "full fine-tuning", ("--method", "full")),
    )
    methods = {cell.name: cell for cell in cells}
    monkeypatch.setitem(GRIDS, "t5", dataclasses.replace(GRIDS["t5"], methods=methods))
    command = ["--grid", "t5", "--speed", "--rounds", "2", "--results", str(tmp_path / "results")]
    command += ["--model", str(study)]
    options = ["--train-examples", "12", "--validation-examples", "4", "--max-length", "48"]
    with jax.numpy_dtype_promotion("standard"):  # optax promotes its counters
        assert __main__.main([*command, "--", *options]) == 0
        assert re.search(r"full fine-tuning +\d+ +1\.00\b", capsys.readouterr().out)
        command[command.index("2")] = "1000"
        assert __main__.main([*command, "--", *options]) == 2
        assert "--rounds is 1000; expected at most" in capsys.readouterr().err
    stored = ResultStore(tmp_path / "results").load("speed")
    shown = "python -m benchmarks.dialogsum --grid t5 --speed --rounds 2"
    assert stored["commands"] == [f"{shown} --model {study} -- {' '.join(options)}"]
    speeds = stored["tokens_per_second"]
    assert list(speeds) == ["lora-8", "full"]
    assert all(len(each) == 2 and min(each) > 0 for each in speeds.values())
    assert 0 < stored["step_bytes"]["lora-8"] < stored["step_bytes"]["full"]


def stored_cell(method, scores, learning_rate=1e-3):
    training = {
        "training": {"method": method, "objective": "sft", "learning_rate": learning_rate},
        "held_out": {"on": {"loss": 1.5}},
        "parameters": {"trainable": 100},
        "adapter_bytes": 1e6,
        "step_bytes": 2e8 if method == "full" else 1e8,
        "rank": 8,
        "method": method,
    }
    each = dict.fromkeys(("rouge1", "rouge2", "rougeL"), scores)
    mean = sum(scores) / len(scores)
    means = {kind: {"mean": mean, "low": mean, "high": mean} for kind in each}
    answers = {"rouge": {"m": means}, "rouge_of_each": {"m": each}, "perplexity": {"m": 5.0}}
    return {"training": training, "answers": answers}


def test_the_tables_compare_dialogue_by_dialogue():
    found = {
        "base": stored_cell("base", [0.1, 0.2]),
        "lora-8": stored_cell("lora", [0.3, 0.4]),
        "full": stored_cell("full", [0.4, 0.5]),
    }
    by_title = {table.title: table for table in tables(GRIDS["smollm2"], found)}
    (differences,) = (table for title, table in by_title.items() if title.startswith("Difference"))
    rows = {row[0]: row[1:] for row in differences.rows}
    assert rows["LoRA, rank 8"] == ["-0.100 (-0.100 to -0.100)"] * 3 + ["0.50"]
    assert rows["the model as it is"][-1] == ""
    assert not any("Ranks" in title for title in by_title)


def test_two_seeds_are_averaged_dialogue_by_dialogue():
    found = {
        "lora-8": stored_cell("lora", [0.3, 0.5]),
        "lora-8-seed-1": stored_cell("lora", [0.1, 0.3]),
        "full": stored_cell("full", [0.4, 0.6]),
        "full-seed-1": stored_cell("full", [0.4, 0.6]),
    }
    (seeds,) = (
        table for table in tables(GRIDS["smollm2"], found) if table.title.startswith("Two seeds")
    )
    rows = {row[0]: row[1] for row in seeds.rows}
    assert rows["LoRA, rank 8"].startswith("0.300 (")
    assert rows["full fine-tuning"].startswith("0.500 (")
    difference = rows["LoRA, rank 8, difference to full fine-tuning"]
    assert difference == "-0.200 (-0.200 to -0.200)"


def test_a_learning_rate_that_no_option_gave_is_that_of_the_method():
    found = {"prompt-20": stored_cell("none", [0.3], None), "full": stored_cell("full", [0.4])}
    (costs,) = (table for table in tables(GRIDS["smollm2"], found) if "costs" in table.title)
    assert {row[0]: row[1] for row in costs.rows} == {
        "full fine-tuning": "0.001",
        "a soft prompt of 20": "0.01",
    }
    assert {row[4] for row in costs.rows} == {"1.0 MB"}
    found["prompt-20"]["training"]["adapter_bytes"] = 46_080
    (costs,) = (table for table in tables(GRIDS["smollm2"], found) if "costs" in table.title)
    assert "46 kB" in {row[4] for row in costs.rows}


def test_memory_is_that_of_the_programs_that_were_timed_together():
    found = {name: stored_cell(name, [0.3]) for name in ("lora-8", "lora-8-seed-1", "full")}
    found["speed"] = {
        "tokens_per_second": {"lora-8": [200.0, 220.0], "full": [100.0, 110.0]},
        "step_bytes": {"lora-8": 3e8, "full": 4e8},
    }
    by_title = {table.title.split(",")[0]: table for table in tables(GRIDS["smollm2"], found)}
    costs, differences, speeds = (
        {row[0]: row[-1] for row in by_title[title].rows}
        for title in (
            "What each training costs",
            "Difference to full fine-tuning on the same dialogues",
            "Speed of training",
        )
    )
    assert costs["LoRA, rank 8"] == "300 MB"
    assert costs["LoRA, rank 8, another seed"] == "100 MB"
    assert differences["LoRA, rank 8"] == "0.75"
    assert speeds == {"LoRA, rank 8": "2.00", "full fine-tuning": "1.00"}


def test_the_command_refuses_other_cells(capsys):
    pytest.importorskip("rouge_score")
    assert __main__.main(["--only", "nothing"]) == 2
    assert "--only nothing is no cell of the grid; one of search-full" in capsys.readouterr().err
    assert __main__.main(["--speed", "--only", "base"]) == 2
    assert "--only chooses cells, and --speed measures all" in capsys.readouterr().err


@pytest.mark.parametrize(("grid", "minutes"), [("smollm2", "42"), ("t5", "11")])
def test_the_command_says_beforehand_how_long_a_cell_takes(
    grid, minutes, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("rouge_score")
    monkeypatch.setattr(Workplace, "compute", lambda *_: None)
    assert __main__.main(["--grid", grid, "--only", "lora-8", "--results", str(tmp_path)]) == 0
    assert re.search(rf"LoRA, rank 8 +{minutes}\b", capsys.readouterr().out)
