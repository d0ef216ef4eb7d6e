"""Runs side by side: what differs in them, and every number paired with that of the first."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf

from olavlm import cli
from olavlm.errors import OlaError
from pipelines.__main__ import main
from pipelines.beside import beside
from pipelines.compare import compare
from pipelines.results import read_lines
from pipelines.see import MAP, Column, Row, TaskView, Tile


@pytest.fixture
def two(finished_run: Path) -> list[Path]:
    """The finished run, and another with one setting changed, whose student is right wherever it reads an option."""
    other = Path(shutil.copytree(finished_run, finished_run.parent / "other"))
    for run, better in ((finished_run, 0.0), (other, 0.03)):
        rows = [
            {"student": student, "task": task, "layer": layer, "key": f"k{i}", "cosine": 0.5 + i / 100 + gain}
            for student, gain in (("initial", -0.2), ("pretrain", better))
            for task in ("depth", "gen")
            for layer in (1, 2)
            for i in range(20)
        ]
        pq.write_table(pa.Table.from_pylist(rows), run / "probe" / "cosines.parquet")
    for stage in ("pretrain", "finetune"):
        file = other / stage / "config.yaml"
        settings = OmegaConf.load(file)
        settings.stages.pretrain.lr = 0.7
        settings.stages.pretrain.losses = {}
        settings.data.pretrain.corpus = "elsewhere/corpus"
        OmegaConf.save(settings, file)
    _rewrite(other, lambda line: line | {"parsed": line["parsed"] and line["answer"]})
    return [finished_run, other]


def _rewrite(run: Path, change: Any) -> None:
    file = run / "evaluate" / "cv_bench" / "replies.jsonl"
    file.write_text("".join(json.dumps(change(line)) + "\n" for line in read_lines(file)))


def _cells(page: Any) -> str:
    return " ".join(page.text.split())


def test_two_runs(read_page: Any, two: list[Path]) -> None:
    path = compare(two)
    assert path == two[0].parent / "compare.html"
    page = read_page(path.read_text())
    text = _cells(page)
    assert len(set(page.ids)) == len(page.ids)
    assert all(link.startswith("#") or link == "data:," for link in page.links)
    assert "2 runs side by side" in text
    assert "stages.pretrain.losses.depth 1.0 – stages.pretrain.lr 0.1 0.7 " in text
    assert "elsewhere" not in text  # a corpus is what is in it, and these runs say nothing of that
    labels = "\n".join(page.labels)
    assert "Probe cosines by layer. depth, initial: 0.61 0.61 0.59 0.60; depth, run: 0.71 0.78" in labels
    assert "Pretraining: text, run from" in labels
    assert "text, other from" in labels
    assert "depth: contrastive, other from" in labels
    assert "CV-Bench accuracies. run: overall" in labels
    # the 16 replies with an option: half of them are right already, now all are
    first, second = (
        [line["parsed"] == line["answer"] for line in read_lines(run / "evaluate" / "cv_bench" / "replies.jsonl")]
        for run in two
    )
    gain = 100 * (sum(second) - sum(first)) / 24
    assert f"micro {gain:+.1f} (" in text
    assert "depth +0.030 (+0.030 to +0.030)" in text
    assert path.read_bytes() == compare(two).read_bytes()


def test_runs_that_were_asked_other_questions_are_not_paired(read_page: Any, two: list[Path]) -> None:
    """The same ids with other choices: the scores stand beside each other, no difference is told."""
    _rewrite(two[1], lambda line: line | {"choices": ["7", "8", "9"]})
    text = _cells(read_page(compare(two).read_text()))
    assert "points over" not in text
    assert "Asked other questions than run, and so not paired with it: other." in text


def test_questions_that_only_one_was_asked_do_not_count(read_page: Any, two: list[Path]) -> None:
    file = two[1] / "evaluate" / "cv_bench" / "replies.jsonl"
    lines = [line for line in read_lines(file) if line["task"] == "Count"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    right = {line["id"]: line["answer"] for line in lines if line["parsed"]}
    before = {x["id"]: x["parsed"] for x in read_lines(two[0] / "evaluate" / "cv_bench" / "replies.jsonl")}
    gain = 100 * (len(right) - sum(before[i] == answer for i, answer in right.items())) / len(lines)
    text = _cells(read_page(compare(two).read_text()))
    assert f"micro {gain:+.1f} (" in text
    assert f"Count {gain:+.1f} (" in text
    assert "overall – 2D –" not in text.split("points over")[0]


def test_what_no_run_has_is_said_to_be_missing(read_page: Any, two: list[Path]) -> None:
    for run in two:
        for stage in ("finetune", "probe", "evaluate"):
            shutil.rmtree(run / stage)
        (run / "pretrain" / "metrics.jsonl").unlink()
    text = _cells(read_page(compare(two).read_text()))
    for said in ("None of the runs has been evaluated", "None of the runs has been probed", "No training stage",
                 "Nothing to see: no run has a student with predictors"):  # fmt: skip
        assert said in text


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (["run"], "1 run; expected two or more"),
        (["run", "nothing"], "nothing: no run here, no stage has a config.yaml"),
        (["run", "other", "other/../run"], "given twice"),
    ],
)
def test_bad_runs_are_one_clear_line(
    two: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runs: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["pipelines", "compare", *(str(two[0].parent / run) for run in runs)])
    assert cli.run(main) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert said in err
    assert not (two[0].parent / "compare.html").exists()


def _view(target: float | None, *layers: float) -> TaskView:
    columns = [] if target is None else [Column("teacher's target", torch.full((1, 2), target))]
    columns += [Column(f"layer {x:.0f}", torch.full((1, 2), x), None if target is None else 0.5) for x in layers]
    tiles = [Tile(np.full((2, 2, 3), i, np.uint8), column.name) for i, column in enumerate(columns)]
    return TaskView("depth", np.zeros((2, 2, 3), np.uint8), columns, [Row(MAP, tiles, True)], ["a note"])


def test_layers_of_several_runs_stand_beside_one_target() -> None:
    (view,) = beside({"a": _view(1.0, 2, 3), "b": _view(1.0, 4)})
    assert [column.name for column in view.columns] == ["teacher's target", "a, layer 2", "a, layer 3", "b, layer 4"]
    assert [tile.note for tile in view.rows[0].tiles] == ["teacher's target", "layer 2", "layer 3", "layer 4"]
    assert view.notes == ["a note"]


@pytest.mark.parametrize("other", [7.0, None])
def test_runs_with_another_target_or_none_have_a_view_of_their_own(other: float | None) -> None:
    views = beside({"a": _view(1.0, 2), "b": _view(other, 4), "c": _view(1.0, 5)})
    assert [[column.name for column in view.columns][-1] for view in views] == ["c, layer 5", "b, layer 4"]
    assert len(views[0].columns) == 3


def test_an_unknown_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OlaError, match="no run here"):
        compare([tmp_path, tmp_path])
