"""CV-Bench: the published layout, and scores checked against cases worked out by hand."""

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from olavlm.errors import OlaError
from olavlm.eval import cv_bench
from olavlm.eval.cv_bench import Question


def row(idx: int, kind: str = "2D", **changes: Any) -> dict[str, Any]:
    return {
        "idx": idx,
        "type": kind,
        "task": "Count" if kind == "2D" else "Depth",
        "image": {"bytes": b"png", "path": None},
        "question": "How many?",
        "choices": ["1", "2"],
        "answer": "(B)",
        "prompt": "How many? Select from the following choices.\n(A) 1\n(B) 2",
        "filename": "img/x.png",
        "source": "COCO" if kind == "2D" else "Omni3D",
        "source_dataset": "a column this package has no use for",
    } | changes


def write(folder: Path, two: list[dict[str, Any]], three: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(two), folder / "test_2d.parquet")
    pq.write_table(pa.Table.from_pylist(three), folder / "test_3d.parquet")
    return folder


def question(number: int, task: str, source: str, answer: str = "A") -> Question:
    return Question(f"x/{number}", task, source, b"", "?", ("yes", "no"), answer, "?")


def test_reads_the_published_layout(tmp_path: Path) -> None:
    questions = cv_bench.load(write(tmp_path, [row(0), row(1, answer="(A)")], [row(0, "3D")]))
    assert [q.id for q in questions] == ["2D/0", "2D/1", "3D/0"]
    assert [q.answer for q in questions] == ["B", "A", "B"]
    assert questions[0].choices == ("1", "2")
    assert questions[0].image == b"png"
    assert cv_bench.build_prompt(questions[0].prompt) == (
        "<image>\nHow many? Select from the following choices.\n(A) 1\n(B) 2\n"
        "Only answer the option as the output. For example, if your answer is the option A, answer (A)."
    )


def test_limit_keeps_the_proportions(tmp_path: Path) -> None:
    folder = write(tmp_path, [row(i) for i in range(60)], [row(i, "3D") for i in range(40)])
    ids = [q.id for q in cv_bench.load(folder, limit=10)]
    assert len(set(ids)) == 10
    assert sum(i.startswith("2D") for i in ids) == 6
    assert len(cv_bench.load(folder, limit=1000)) == 100


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"answer": "(C)"}, "answer is '(C)', expected one of (A), (B)"),
        ({"answer": None}, "answer is None"),
        ({"answer": "AB"}, "answer is 'AB'"),
        ({"type": "3D"}, "type is '3D', expected 2D"),
        ({"task": "Colour"}, "task is 'Colour', expected Count or"),
        ({"source": "mine"}, "source is 'mine', expected ADE20K or"),
        ({"choices": ["1"]}, "expected two or more"),
        ({"image": {"bytes": b"", "path": "a.png"}}, "expected a struct with the encoded image"),
    ],
)
def test_broken_rows_are_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = write(tmp_path, [row(7, **changes)], [row(0, "3D")])
    with pytest.raises(OlaError) as error:
        cv_bench.load(folder)
    assert "test_2d.parquet: idx 7: " in str(error.value)
    assert words in str(error.value)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(OlaError, match=r"test_2d\.parquet: no such file.*nyu-visionx"):
        cv_bench.load(tmp_path)
    write(tmp_path, [row(0), row(0)], [row(0, "3D")])
    with pytest.raises(OlaError, match="idx 0 stands there twice"):
        cv_bench.load(tmp_path)
    less = row(0, "3D")
    del less["prompt"], less["choices"]
    write(tmp_path, [row(0)], [less])
    with pytest.raises(OlaError, match=r"test_3d\.parquet: no column choices, prompt; found idx, "):
        cv_bench.load(tmp_path)
    (tmp_path / "test_3d.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(OlaError, match=r"test_3d\.parquet: not a readable Parquet file"):
        cv_bench.load(tmp_path)


def test_scores_by_hand() -> None:
    # ADE20K 3 of 4, COCO 1 of 2, Omni3D 1 of 5 with one unanswered.
    asked = [
        *(question(i, "Count", "ADE20K") for i in range(2)),
        *(question(i, "Relation", "ADE20K") for i in range(2, 4)),
        *(question(i, "Relation", "COCO") for i in range(4, 6)),
        *(question(i, "Depth", "Omni3D") for i in range(6, 9)),
        *(question(i, "Distance", "Omni3D") for i in range(9, 11)),
    ]
    answers = dict(zip([q.id for q in asked], ["A", "A", "B", "A", "A", "B", "A", "B", None, "B", "B"], strict=True))
    scores = cv_bench.score(asked, answers)
    assert scores["ADE20K"]["accuracy"] == 3 / 4
    assert scores["COCO"]["accuracy"] == 1 / 2
    assert scores["2D"]["accuracy"] == pytest.approx((3 / 4 + 1 / 2) / 2)  # not 4/6: sources weigh the same
    assert scores["3D"]["accuracy"] == 1 / 5
    assert scores["overall"]["accuracy"] == pytest.approx((5 / 8 + 1 / 5) / 2)
    assert scores["micro"]["accuracy"] == 5 / 11
    assert {t: (c["accuracy"], c["n"]) for t in cv_bench.TASKS if (c := scores[t])} == {
        "Count": (1.0, 2),
        "Relation": (0.5, 4),
        "Depth": (1 / 3, 3),
        "Distance": (0.0, 2),
    }
    assert scores["micro"]["answered"] == 10 / 11
    assert scores["Depth"]["answered"] == 2 / 3
    assert scores["overall"]["answered"] == pytest.approx(10 / 11)
    assert scores["ADE20K"]["stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    two = math.sqrt((0.75 * 0.25 / 4 + 0.5 * 0.5 / 2) / 4)
    assert scores["2D"]["stderr"] == pytest.approx(two)
    assert scores["overall"]["stderr"] == pytest.approx(math.sqrt(two**2 + 0.2 * 0.8 / 5) / 2)
    assert scores["overall"]["n"] == 11


def test_unanswered_is_wrong_and_missing_is_refused() -> None:
    asked = [question(0, "Count", "COCO"), question(1, "Count", "COCO")]
    assert cv_bench.score(asked, {"x/0": None, "x/1": None})["micro"] == {
        "accuracy": 0.0,
        "stderr": 0.0,
        "n": 2,
        "answered": 0.0,
    }
    with pytest.raises(OlaError, match="1 of 2 questions have no reply: x/1"):
        cv_bench.score(asked, {"x/0": "A"})


def test_an_absent_source_gives_no_aggregate() -> None:
    scores = cv_bench.score([question(0, "Count", "COCO")], {"x/0": "A"})
    assert scores["ADE20K"] is scores["2D"] is scores["overall"] is scores["Depth"] is None
    assert scores["micro"]["accuracy"] == 1.0


@given(
    st.lists(st.tuples(st.sampled_from(cv_bench.TASKS), st.sampled_from(cv_bench.SOURCES), st.booleans()), min_size=1)
)
def test_score_properties(rows: list[tuple[str, str, bool]]) -> None:
    asked = [question(i, task, source) for i, (task, source, _) in enumerate(rows)]
    answers: dict[str, str | None] = {f"x/{i}": "A" if right else "B" for i, (_, _, right) in enumerate(rows)}
    scores = cv_bench.score(asked, answers)
    micro = sum(c["accuracy"] * c["n"] for t in cv_bench.TASKS if (c := scores[t])) / len(rows)
    assert scores["micro"]["accuracy"] == pytest.approx(micro)
    assert scores == cv_bench.score(asked[::-1], answers)
