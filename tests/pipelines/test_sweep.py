"""Sweeps: every combination once, stages in common trained once, seeds joined in the table."""

import io
import json
import os

import pytest
from rich.console import Console

from olavlm import runs
from olavlm.config import load_pipeline
from olavlm.errors import OlaError
from pipelines.sweep import show, sweep


@pytest.fixture
def started(replace_processes):
    """Every stage finishes at once, with a loss made of its settings, unless it is to fail."""

    def leave(config, stage, folder):
        return {"final": {"loss": config.seed + 10 * config.stages["finetune"].lr}} if stage in config.stages else {}

    return replace_processes(leave)


OVER_LR = ("stages.finetune.lr", ["0.1", "0.2"])
OVER_SEED = ("seed", ["1", "3"])


def rows(tmp_path):
    return json.loads((tmp_path / "sweep" / "sweep.json").read_text())["settings"]


def test_every_combination_runs_on_the_one_store_and_seeds_are_joined(started, tmp_path, capsys):
    calls, _ = started
    assert sweep("demo", [f"run_dir={tmp_path}"], [OVER_LR, OVER_SEED]) == 0
    assert [stage for stage, _ in calls[:2]] == ["corpus", "featurize"]
    assert [name for stage, name in calls if stage == "finetune"] == [
        f"lr={lr},seed={seed}" for lr in ("0.1", "0.2") for seed in ("1", "3")
    ]
    config = runs.stage_dir(load_pipeline("demo", [f"run_dir={tmp_path}"]), "sweep") / "lr=0.1,seed=1" / "finetune"
    assert str(tmp_path / "corpus" / "finetune") in (config / "config.yaml").read_text()
    first, second = rows(tmp_path)
    assert first["values"] == {"stages.finetune.lr": "0.1"}
    assert (first["seeds"], second["seeds"]) == (2, 2)
    assert first["mean"]["finetune loss"] == pytest.approx(2 + 1)
    assert second["mean"]["finetune loss"] == pytest.approx(2 + 2)
    assert first["stderr"]["finetune loss"] == pytest.approx(1)  # of 1 and 3: their half difference
    assert "lr=0.2" in capsys.readouterr().out


def test_a_stage_in_common_is_trained_once_and_a_second_sweep_does_nothing(started, tmp_path):
    calls, _ = started
    sweep("demo", [f"run_dir={tmp_path}"], [OVER_LR])
    assert [name for stage, name in calls if stage == "pretrain"] == ["lr=0.1"]
    linked = tmp_path / "sweep" / "lr=0.2" / "pretrain"
    assert os.readlink(linked) == "../lr=0.1/pretrain"
    before = list(calls)
    sweep("demo", [f"run_dir={tmp_path}"], [OVER_LR])
    assert calls == before
    sweep("demo", [f"run_dir={tmp_path}"], [("stages.finetune.lr", ["0.1", "0.2", "0.3"])])
    assert {name for _, name in calls[len(before) :]} == {"lr=0.3"}


def test_several_at_a_time_train_what_they_have_in_common_once(started, tmp_path):
    calls, _ = started
    assert sweep("demo", [f"run_dir={tmp_path}"], [OVER_LR, OVER_SEED], jobs=4) == 0
    assert sorted(name.partition(",")[2] for stage, name in calls if stage == "pretrain") == ["seed=1", "seed=3"]
    assert sum(stage == "finetune" for stage, _ in calls) == 4
    assert [row["seeds"] for row in rows(tmp_path)] == [2, 2]


def test_a_failing_setting_is_named_and_the_others_go_on(started, tmp_path, capsys):
    calls, codes = started
    codes["finetune", "lr=0.1"] = 2
    assert sweep("demo", [f"run_dir={tmp_path}"], [OVER_LR]) == 1
    assert ("evaluate", "lr=0.1") not in calls
    assert ("evaluate", "lr=0.2") in calls
    assert "failed: lr=0.1, in finetune" in capsys.readouterr().out
    codes.clear()
    assert sweep("demo", [f"run_dir={tmp_path}"], [OVER_LR]) == 0
    assert ("evaluate", "lr=0.1") in calls


def test_ctrl_c_ends_the_sweep(started, tmp_path):
    calls, codes = started
    codes["pretrain", "lr=0.1"] = 130
    assert sweep("demo", [f"run_dir={tmp_path}"], [OVER_LR]) == 130
    assert calls[-1] == ("pretrain", "lr=0.1")


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        (("stages.finetune.lr", []), "expected a key, once, and the values"),
        (("teachers.depth.grid", ["4"]), "share one corpus and one store"),
        (("stages.finetune.lr", ["-1"]), "greater than 0"),
        (("stages.finetune.learning_rate", ["1"]), "learning_rate"),
    ],
)
def test_bad_axes_are_refused_before_anything_runs(started, tmp_path, axis, message):
    calls, _ = started
    with pytest.raises(OlaError, match=message):
        sweep("demo", [f"run_dir={tmp_path}"], [axis])
    assert not calls


def test_a_setting_is_called_what_it_is_whatever_brackets_it_has(started, tmp_path, capsys):
    overrides = [f"run_dir={tmp_path}", "stages.finetune.lr=0.1"]
    assert sweep("multi-encoder", overrides, [("student.encoders", ["[]", "[depth]"])]) == 0
    out = capsys.readouterr().out
    assert out.count("encoders=[]") == out.count("encoders=[depth]") == 2  # when it begins, and in the table


@pytest.mark.parametrize(("width", "tables"), [(80, 2), (200, 1)])
def test_the_table_is_whole_whatever_the_width(width, tables):
    metrics = {f"probe {name}": 0.5 for name in ("depth", "seg", "gen")} | {"finetune loss": 1.25, "2D": 0.25}
    rows = [
        {"values": {"stages.finetune.lr": f"{i}e-3"}, "seeds": 2, "mean": metrics, "stderr": {"2D": 0.0625}}
        for i in range(1, 6)
    ]
    console = Console(file=io.StringIO(), width=width)
    show(rows, console)
    text = console.file.getvalue()
    assert "…" not in text
    assert text.count("finetune loss") == tables
    assert text.count("0.250 ± 0.062") == 5
    assert all(f"lr={i}e-3" in text for i in range(1, 6))
