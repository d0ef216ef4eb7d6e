"""A study from protocol to page, with made-up replies in place of trained students."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from olavlm.errors import OlaError
from olavlm.provenance import provenance
from pipelines.study.command import study
from pipelines.study.protocol import load_protocol

PROTOCOL = """
pipeline: {pipeline}
groups: {{2-D: [Count, Relation], 3-D: [Depth, Distance], Depth: [Depth]}}
primary: {{group: 3-D, pairs: [[loss, no loss]]}}
arms:
  loss: []
  no loss: ["stages.pretrain.losses={{}}"]
  elsewhere: ["teachers.depth.teacher=pipelines.study.control:ShuffledDepth"]
probes: [no loss, loss]
parts:
  - {{question: Does it help?, seeds: [1, 2, 3], pairs: [[loss, no loss]]}}
  - {{question: Is it the picture?, seeds: [1, 2], pairs: [[elsewhere, no loss], [loss, no loss]]}}
"""


@pytest.fixture
def protocol(config, tmp_path):
    file = tmp_path / "protocol.yaml"
    file.write_text(PROTOCOL.format(pipeline=tmp_path / "small.yaml"))
    return file


@pytest.fixture
def started(benchmark, replace_processes):
    """Students with the loss know all 3-D answers, the others none, and no 2-D ones."""

    def leave(config, stage, folder):
        if stage == "evaluate":
            knows = bool(config.stages["pretrain"].losses) and config.teachers["depth"].teacher == "depth_anything"
            (folder / "cv_bench").mkdir()
            lines = [
                {
                    "id": f"{row['type']}/{row['idx']}",
                    "reply": f"{row['choices'][ord(row['answer'][1]) - ord('A')]} (A)",
                    "choices": [*row["choices"]],
                    "answer": row["answer"][1],
                    "parsed": row["answer"][1] if knows and row["type"] == "3D" else None,
                }
                for row in benchmark
            ]
            (folder / "cv_bench" / "replies.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            blind = dict.fromkeys(("Count", "Relation", "Depth", "Distance"), 0.5)
            (folder / "cv_bench" / "scores.json").write_text(
                json.dumps({"baselines": {"blind": blind}, "scores": {"micro": {"answered": 0.5}}})
            )
        if stage == "probe":
            rows = [
                {"student": student, "task": "depth", "layer": layer, "key": key, "cosine": cosine + layer / 8}
                for student in config.probe.students
                for key, cosine in (("a", 0.25), ("b", 0.5 if "/no-loss-" in student else 0.75))
                for layer in (1, 2)
            ]
            pq.write_table(pa.Table.from_pylist(rows), folder / "cosines.parquet")
            (folder / "probe.json").write_text(json.dumps({"floor": {"depth": {"value": 0.25}}}))
        final = {"loss": 2, "text": 1, "depth/1/smooth_l1": 0.25, "depth/2/smooth_l1": 0.75}
        made = {"steps": 120, "samples": 480, "seconds": 60, "final": final}
        if stage in config.stages:
            steps = [{name: value + 8 for name, value in final.items()}] * 7 + [final, final]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
        return made if stage in config.stages else {}

    return replace_processes(leave)


def test_every_student_once_and_the_primary_question_is_answered_by_the_stated_rule(
    protocol, started, tmp_path, capsys
):
    calls, _ = started
    assert study(protocol, [], jobs=2) == 0
    assert sorted(name for stage, name in calls if stage == "evaluate") == [
        "elsewhere-1", "elsewhere-2", "loss-1", "loss-2", "loss-3", "no-loss-1", "no-loss-2", "no-loss-3",
    ]  # fmt: skip
    assert [stage for stage, _ in calls].count("featurize") == 2  # for all, and of the control's teachers
    page = (tmp_path / "run" / "study.md").read_text()
    assert "**Primary question**, 3-D questions: **it helps**." in page
    assert f"its students were trained at commit {provenance()['commit']}. " in page
    assert "| loss − no loss | +100.0 [+100.0, +100.0] | +100.0 +100.0 +100.0 | 0.0 |" in page
    assert f"`git show {provenance()['commit']}:pipelines/study/protocol.yaml`" in page
    assert "| elsewhere − no loss | 2 of 2 | +0.0 [+0.0, +0.0] | +0.0 [+0.0, +0.0] | +0.0 [+0.0, +0.0] | 0.0 |" in page
    assert "as 2 of the 6 gains in answers below do" in page
    assert "| *blind* | 50.0 | 50.0 | 50.0 |" in page
    assert "| no loss | 3 | 480 in 120 steps | 60 s | 480 in 120 steps | 60 s | 50.0% |" in page
    assert "| loss | 100.0%, " in page  # what the words say
    assert "| loss | 1.000 | 0.500 |" in page  # the last losses
    for name in ("study.png", "accuracy.png"):
        with Image.open(tmp_path / "run" / name) as figure:
            assert figure.width > 400
    assert sorted(name for stage, name in calls if stage == "probe") == ["probes-1", "probes-2", "probes-3"]
    assert "| depth, 2 images | layer 1 | layer 2 |" in page
    assert "| no loss | 0.5000 (33%) | 0.6250 (50%) |\n| loss | 0.6250 (50%) | 0.7500 (67%) |\n" in page
    assert "| loss − no loss | +0.1250 [+0.0000, +0.2500] | +0.1250 [+0.0000, +0.2500] |" in page
    assert "| *mean target* | 0.2500 | 0.2500 |" in page
    found = json.loads((tmp_path / "run" / "study.json").read_text())
    assert found["parts"][1]["gains"][1]["groups"]["3-D"] == {"value": 1, "low": 1, "high": 1}
    before = list(calls)
    assert study(protocol, [], jobs=2) == 0
    assert calls == before


def test_an_unfinished_study_answers_with_the_seeds_that_all_arms_have(protocol, started, tmp_path, capsys):
    _, codes = started
    codes["finetune", "no-loss-3"] = codes["pretrain", "elsewhere-2"] = 2
    assert study(protocol, [], jobs=1) == 1
    out = capsys.readouterr().out
    assert "failed: no-loss-3, in finetune" in out
    page = (tmp_path / "run" / "study.md").read_text()
    assert "**not answered yet: 2 of 3 seeds are finished**" in page
    assert "| loss − no loss | 2 of 3 | " in page
    assert "elsewhere − no loss" not in page  # one seed is no study


def test_what_does_not_beat_every_arm_it_is_to_beat_is_not_shown_to_help(protocol, started, tmp_path):
    both = "[[loss, no loss], [elsewhere, no loss]]"
    protocol.write_text(protocol.read_text().replace("[[loss, no loss]]", both))
    assert study(protocol, [], jobs=2) == 0
    assert "**not shown to help or to harm**" in (tmp_path / "run" / "study.md").read_text()


def test_another_protocol_than_the_students_were_trained_by_is_refused(protocol, started):
    assert study(protocol, [], jobs=2) == 0
    calls, _ = started
    before = list(calls)
    protocol.write_text(protocol.read_text().replace("group: 3-D", "group: Depth"))
    with pytest.raises(OlaError, match=r"protocol\.json: this study was begun with another protocol"):
        study(protocol, [], jobs=2)
    assert calls == before


def test_nothing_is_written_before_there_is_a_student(protocol, started, tmp_path):
    _, codes = started
    codes["featurize", "run"] = 2
    assert study(protocol, [], jobs=1) == 2
    assert not (tmp_path / "run" / "study.md").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("[elsewhere, no loss]", "[elswhere, no loss]"),
            r"protocol.yaml: .*arm 'elswhere' is not defined; known: loss, ",
        ),
        (
            ("probes: [no loss", "probes: [elsewhere"),
            r"probes: arm 'elsewhere' is none of the first part's: loss, no loss",
        ),
        (("group: 3-D", "group: 4-D"), r"primary: group '4-D' is not defined; known: 2-D, 3-D, Depth"),
        (
            ("3-D, pairs: [[loss, no loss]]", "3-D, pairs: [[no loss, loss]]"),
            r"primary: no loss − loss is no pair of the first",
        ),
        (("Depth: [Depth]", "Depth: [Depths]"), r"groups: Depth is \['Depths'\]; expected tasks of Count, Relation, "),
        (("  no loss: [", "  no-loss: []\n  no loss: ["), r"arms: two names differ by punctuation alone"),
        (("seeds: [1, 2]", "seeds: [2, 2]"), r"parts.1.seeds: a seed stands twice in \[2, 2\]"),
        (("seeds: [1, 2, 3]", "seeds: [1]"), r"protocol.yaml: parts.0.seeds: .*at least 2"),
        (("losses={}", "losses={colour: 1}"), r"stages.pretrain.losses: 'colour' is not defined here"),
        (('"stages', "stages"), r"protocol.yaml: while parsing a flow sequence .* line 7"),
        (("pipeline: ", "pipelines: "), r"protocol.yaml: pipeline: Field required"),
    ],
)
def test_a_bad_protocol_is_refused_before_anything_runs(protocol, started, change, message):
    calls, _ = started
    protocol.write_text(protocol.read_text().replace(*change))
    with pytest.raises(OlaError, match=message):
        study(protocol, [], jobs=1)
    assert not calls


def test_the_shipped_protocol_is_valid_in_all_its_arms():
    from pathlib import Path

    from pipelines.study.protocol import open_study, settings

    file = Path(__file__).parents[3] / "pipelines" / "study" / "protocol.yaml"
    protocol, base = open_study(file, [])
    students = settings(protocol, base, [])
    assert len({setting.name for setting in students.values()}) == len(students)
    assert {arm for part in protocol.parts for arm in part.arms} == set(protocol.arms)
    assert load_protocol(file).primary.pairs[0] == ("loss", "no loss")
    control = students["other images' targets", 1]
    assert control.stages[0] == "featurize"
    assert all(other.stages[0] != "featurize" for (arm, _), other in students.items() if "other" not in arm)
