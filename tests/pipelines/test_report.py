"""The report: self-contained, complete where stages have run, and honest where they have not."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from olavlm.config import PipelineConfig
from olavlm.errors import OlaError
from pipelines import replies as replies_module
from pipelines import report as report_module
from pipelines.figures import picture
from pipelines.replies import SHOWN, browse
from pipelines.report import report
from pipelines.results import duration, read_lines, summary
from pipelines.verdict import verdict


@pytest.fixture
def with_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for teachers and target store, which have tests of their own."""

    def pictures(config: PipelineConfig, data: str, n: int) -> list[dict[str, Any]]:
        rng = np.random.default_rng(0)
        names = ("image", "depth", "depth features", "gen nearest")
        return [
            {"key": f"k{i}", **{name: rng.integers(0, 255, (16, 16, 3), dtype=np.uint8) for name in names}}
            for i in range(3)
        ]

    monkeypatch.setattr(report_module, "pictures", pictures)


@pytest.mark.usefixtures("with_pictures")
def test_a_finished_run(read_page: Any, config: PipelineConfig, finished_run: Path) -> None:
    path = report(config)
    text = path.read_text()
    assert path == finished_run / "report.html"
    assert "http://" not in text
    assert "https://" not in text
    assert not re.search(r"@import|url\((?!#)", text)
    page = read_page(text)
    assert all(link.startswith(("#", "data:image/")) or link == "data:," for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    assert all(image["alt"] for image in page.images)
    assert len(page.images) == 3 * 4 + 24  # pictures, and the images of the replies: there are few, so all are shown
    assert len(page.labels) == 5  # two stages' losses, the parts of one, probes, scores
    assert any("depth, pretrain: 0.71 0.78 0.77 0.71" in label for label in page.labels)
    assert "not finished" not in page.text
    assert "mean target 0.50" in page.text
    assert "0.60 → 0.74" in page.text  # the depth probe before and after
    assert "no idea" in page.text
    assert page.text.count("read as no option") == 8
    assert "How many <b>chairs</b> & tables?" in page.text  # escaped, shown as it is
    assert "2 images have no target" in page.text
    assert "This run does not show that the student looks at the picture." in page.text
    assert "global_batch: 4" in page.text


def test_the_verdict_on_depth_weighs_against_cues(config: PipelineConfig, finished_run: Path) -> None:
    """Ahead of those who see nothing; ahead or not of those who know the boxes, by more than the interval."""
    file = finished_run / "evaluate" / "cv_bench" / "scores.json"
    scores = json.loads(file.read_text())
    for row in ("overall", "3D"):
        scores["scores"][row] |= {"accuracy": 0.8, "stderr": 0.05}
    for boxes, seen in ((0.6, True), (0.75, False)):
        scores["baselines"] |= {"size": {"3D": 0.5}, "2-D boxes": {"3D": boxes}}
        file.write_text(json.dumps(scores))
        said = verdict(summary(config), "cv_bench")
        assert said
        assert f"not depth, 2-D boxes: {boxes:.1%}" in said
        assert ("does not show that it sees depth" in said) is not seen


@pytest.mark.usefixtures("finished_run")
def test_the_same_run_gives_the_same_page(config: PipelineConfig) -> None:
    assert report(config).read_bytes() == report(config).read_bytes()


def test_missing_stages_are_said_to_be_missing(read_page: Any, config: PipelineConfig, tmp_path: Path) -> None:
    with pytest.raises(OlaError, match=r"no folder .*run; run a stage of pipeline small first"):
        report(config)
    (tmp_path / "run").mkdir()
    page = read_page(report(config).read_text())
    for words in (
        "No stage of this run has finished yet",
        "Stage featurize has not finished",
        "No pictures: ",
        "No training stage has logged a step yet",
        "pretrain has not finished; run it first (make pretrain).",
        "Stage probe has not finished",
        "Stage evaluate has not finished",
        "No replies yet",
    ):
        assert words in page.text
    assert page.text.count("not finished") >= 6


def test_stages_at_work_are_shown_as_far_as_they_are(
    read_page: Any, config: PipelineConfig, finished_run: Path
) -> None:
    (finished_run / "pretrain" / "done.json").unlink()
    (finished_run / "finetune" / "metrics.jsonl").unlink()
    with (finished_run / "pretrain" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 121, "los')  # half a line
    (finished_run / "evaluate" / "cv_bench" / "scores.json").unlink()
    (finished_run / "evaluate" / "cv_bench" / "replies.jsonl").write_text(
        '{"id": "2D/0", "prompt": "?", "reply": "(A)"}\n'
    )
    (finished_run / "probe" / "probe.json").write_text('{"students": {}, "floor": {}}')
    page = read_page(report(config).read_text())
    assert "Pretraining, 120 steps" in page.text
    assert "Fine-tuning," not in page.text
    assert "No replies yet" in page.text


def test_replies_outlive_their_images(
    read_page: Any, config: PipelineConfig, finished_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "cv_bench" / "test_2d.parquet").unlink()
    page = read_page(report(config).read_text())
    assert page.text.count("image not there") == 24
    assert "no idea" in page.text


def test_failures_come_first_and_all_of_them_are_counted(
    config: PipelineConfig, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = finished_run / "evaluate" / "cv_bench" / "replies.jsonl"
    lines = read_lines(file)
    for i in range(400):  # of one task: 200 wrong, 100 right, 100 unanswered
        parsed = ("B", "A", None, "B")[i % 4]
        lines.append(lines[0] | {"id": f"2D/{100 + i}", "answer": "A", "parsed": parsed})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    count, *_ = tasks = browse(config)
    assert [task.name for task in tasks] == ["Count", "Relation", "Depth", "Distance"]
    assert sum(count.counts.values()) == 406
    shown = [reply["outcome"] for reply in count.replies]
    assert shown == [kind for kind, n in SHOWN.items() for _ in range(n)]  # failures first
    wrong = [int(reply["id"].split("/")[1]) for reply in count.replies if reply["outcome"] == "wrong"]
    assert wrong == sorted(wrong)
    assert wrong[-1] > 450 > 350 > wrong[len(wrong) // 2] > 250  # spread over the benchmark
    size = max(len(task.replies[0]["picture"] or "") for task in tasks)
    monkeypatch.setattr(replies_module, "_BUDGET", 8 * size)  # some images have to stay away, no task's all
    pictures = [[reply["picture"] for reply in task.replies] for task in browse(config)]
    assert all(of[0] for of in pictures)
    assert 4 * size < sum(len(one) for of in pictures for one in of if one) <= 8 * size


@pytest.mark.usefixtures("finished_run")
def test_summary_by_hand(config: PipelineConfig, tmp_path: Path) -> None:
    result = summary(config)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == result
    assert result["targets"]["images"] == 1000
    assert result["targets"]["float16_bytes_per_image"] == {"depth": 2 * 64 * 96, "gen": 2 * 96}
    assert result["probe"]["depth"]["floor"] == 0.5
    assert result["probe"]["depth"]["students"]["initial"] == pytest.approx((0.61 + 0.61 + 0.59 + 0.60) / 4)
    assert list(result["stages"]) == ["corpus", "featurize", "pretrain", "finetune", "probe", "evaluate"]
    assert result["stages"]["pretrain"]["samples_per_s"] == 11.5
    assert result["benchmarks"]["cv_bench"]["scores"]["micro"]["n"] == 24
    assert result["benchmarks"]["cv_bench"]["baselines"]["blind"]["overall"] == 0.5
    assert {"python", "torch", "transformers"} <= result["provenance"]["versions"].keys()


def test_pictures_are_never_larger_than_needed() -> None:
    flat = np.full((900, 1200, 3), 200, np.uint8)
    noise = np.random.default_rng(0).integers(0, 255, (900, 1200, 3), dtype=np.uint8)
    assert picture(flat).startswith("data:image/png;base64,")
    assert picture(noise).startswith("data:image/jpeg;base64,")
    assert picture(noise[:64, :64]).startswith("data:image/png;base64,")


def test_numbers_for_people(tmp_path: Path) -> None:
    assert [duration(s) for s in (0.4, 59, 60, 3599, 3600, 90_000)] == [
        "0 s", "59 s", "1 min", "1 h 0 min", "1 h 0 min", "25 h 0 min",
    ]  # fmt: skip
    assert read_lines(tmp_path / "nothing.jsonl") == []


def test_probe_tasks_are_shown_with_what_the_target_itself_gives(
    read_page: Any, config: PipelineConfig, finished_run: Path
) -> None:
    def cell(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 50}

    found = {
        "students": {"pretrain": {"order": {"1": cell(0.6), "2": cell(0.7)}, "fid": {"2": {"value": 31.0, "n": 50}}}},
        "reference": {"order": {"target": cell(0.9), "floor": cell(0.5)}},
        "measures": {"order": {"title": "depth order", "better": "higher"}, "fid": {"title": "FID", "better": "lower"}},
    }
    folder = finished_run / "probe_tasks"
    folder.mkdir()
    (folder / "probe_tasks.json").write_text(json.dumps(found))
    (label,) = [label for label in read_page(report(config).read_text()).labels if label.startswith("Probe tasks")]
    assert "depth order (higher is better), pretrain: 0.60 0.70" in label
    assert "depth order (higher is better), the target itself: 0.90" in label
    assert "FID (lower is better), pretrain: 31.00" in label
