"""The evaluate stage from an exported student to its scores."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from olavlm import runs
from olavlm.config import PipelineConfig, dump
from olavlm.errors import OlaError
from olavlm.eval.answers import PARSER_VERSION
from pipelines import evaluate as stage
from pipelines.evaluate import evaluate
from pipelines.report import report


@pytest.fixture
def student(config: PipelineConfig, tiny_student: tuple[Any, Any], finish: Callable[..., Path]) -> Path:
    """An exported model where fine-tuning would have left it."""
    torch.set_num_threads(1)
    folder = finish("finetune") / "model"
    for part in tiny_student:
        part.save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("student")
def test_replies_scores_and_baselines(
    config: PipelineConfig, benchmark: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(config)
    folder = Path(config.run_dir) / "evaluate" / "cv_bench"
    lines = [json.loads(line) for line in (folder / "replies.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"{row['type']}/{row['idx']}" for row in benchmark]
    assert all(line["prompt"].endswith("answer (A).") and line["parser_version"] == PARSER_VERSION for line in lines)
    result = json.loads((folder / "scores.json").read_text())
    right = sum(line["parsed"] == line["answer"] for line in lines)
    assert result["scores"]["micro"]["accuracy"] == right / 24
    assert result["baselines"]["chance"]["Count"] == pytest.approx(1 / 2)
    assert result["baselines"]["chance"]["Relation"] == pytest.approx(1 / 3)
    assert result["baselines"]["blind"]["Depth"] == pytest.approx(0.55)
    assert result["baselines"]["blind"]["3D"] == pytest.approx((0.55 + 0.5) / 2)
    assert json.loads((folder.parent / "done.json").read_text())["questions"] == 24
    assert "overall" in capsys.readouterr().out
    assert lines[0]["reply"] in report(config).read_text()


@pytest.mark.usefixtures("student", "benchmark")
def test_resumed_and_finished(config: PipelineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(config)
    folder = Path(config.run_dir) / "evaluate" / "cv_bench"
    files = {name: (folder / name).read_bytes() for name in ("replies.jsonl", "scores.json")}
    (folder.parent / "done.json").unlink()
    (folder / "scores.json").unlink()
    (folder / "replies.jsonl").write_bytes(files["replies.jsonl"][: len(files["replies.jsonl"]) // 2])
    evaluate(config)
    assert {name: (folder / name).read_bytes() for name in files} == files
    monkeypatch.setattr(stage, "generate_replies", None)  # a finished stage asks nothing
    evaluate(config)


@pytest.mark.usefixtures("student", "benchmark")
def test_two_do_not_ask_in_one_folder(config: PipelineConfig) -> None:
    folder = Path(config.run_dir) / "evaluate"
    with runs.alone(folder), pytest.raises(OlaError, match="evaluate: another process is at work in this folder"):
        evaluate(config)
    assert [file.name for file in folder.iterdir()] == [".lock"]


def with_mmstar(config: PipelineConfig, folder: Path) -> PipelineConfig:
    assert config.eval
    return config.model_copy(update={"eval": config.eval.model_copy(update={"mmstar": str(folder)})})


@pytest.mark.usefixtures("student", "benchmark")
def test_two_benchmarks(config: PipelineConfig, mmstar: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = with_mmstar(config, mmstar)
    evaluate(config)
    folder = Path(config.run_dir) / "evaluate"
    scores = {key: json.loads((folder / key / "scores.json").read_text()) for key in ("cv_bench", "mmstar")}
    lines = [json.loads(line) for line in (folder / "mmstar" / "replies.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"MMStar/{i}" for i in range(12)]
    assert lines[0]["prompt"].endswith("D: 4\nAnswer with the option's letter from the given choices directly")
    assert lines[0]["choices"] == ["1", "2", "3", "4"]
    found = scores["mmstar"]["scores"]
    assert found["macro"]["accuracy"] == pytest.approx(sum(line["parsed"] == line["answer"] for line in lines) / 12)
    assert found["macro"]["n"] == 12
    assert scores["mmstar"]["baselines"] == {"chance": dict.fromkeys(found, 0.25)}
    assert json.loads((folder / "done.json").read_text())["questions"] == 36
    printed = capsys.readouterr().out
    assert "CV-Bench, %" in printed
    assert "macro" in printed
    page = report(config).read_text()
    assert "MMStar macro" in page
    assert "CV-Bench overall" in page
    assert "fine-grained perception" in page


@pytest.mark.usefixtures("student", "benchmark")
def test_ranks_of_torchrun_share_the_questions(
    config: PipelineConfig, mmstar: Path, processes: Callable[..., Any], tmp_path: Path
) -> None:
    alone = with_mmstar(config, mmstar)
    evaluate(alone)
    (tmp_path / "several.yaml").write_text(dump(alone.model_copy(update={"run_dir": str(tmp_path / "several")})))
    (tmp_path / "several").mkdir()
    (tmp_path / "several" / "finetune").symlink_to(tmp_path / "run" / "finetune")
    ended = processes("evaluate", tmp_path / "several.yaml", module="pipelines", ranks=2)
    assert ended.codes == [0, 0], ended.output
    for name in ("cv_bench/replies.jsonl", "cv_bench/scores.json", "mmstar/replies.jsonl", "mmstar/scores.json"):
        ours, theirs = (Path(tmp_path) / run / "evaluate" / name for run in ("run", "several"))
        assert theirs.read_bytes() == ours.read_bytes()
    assert not list((tmp_path / "several").rglob("*.rank*"))


@pytest.mark.usefixtures("benchmark")
def test_what_is_missing_is_named(config: PipelineConfig, student: Path, tmp_path: Path) -> None:
    (student / "config.json").unlink()
    with pytest.raises(OlaError, match=r"eval\.student: 'finetune' has finished, but there is no model in .* any more"):
        evaluate(config)
    (student.parent / "done.json").unlink()
    with pytest.raises(OlaError, match=r"finetune has not finished; run it first \(make finetune\)"):
        evaluate(config)
    (tmp_path / "cv_bench" / "test_3d.parquet").unlink()
    with pytest.raises(OlaError, match=r"test_3d\.parquet: no such file"):
        evaluate(config)
    with pytest.raises(OlaError, match="no `eval` section"):
        evaluate(config.model_copy(update={"eval": None}))


@pytest.mark.usefixtures("student", "benchmark")
def test_a_student_of_another_configuration_is_not_asked(config: PipelineConfig) -> None:
    with pytest.raises(OlaError, match=r"finetune/config\.yaml was made with another .*\(seed: 0 there, 1 now\)"):
        evaluate(config.model_copy(update={"seed": 1}))


@pytest.mark.usefixtures("student", "benchmark")
def test_baselines_must_cover_every_task(config: PipelineConfig, tmp_path: Path) -> None:
    (tmp_path / "cv_bench" / "baselines.json").write_text('{"blind": {"Count": 0.5}}')
    with pytest.raises(OlaError, match=r"baselines\.json: blind: no accuracy for Depth, Distance, Relation"):
        evaluate(config)
