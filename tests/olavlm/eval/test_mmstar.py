"""MMStar: the published layout with its two ways of listing options, and scores checked by hand."""

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from olavlm.errors import OlaError
from olavlm.eval import mmstar
from olavlm.eval.cv_bench import Question

INLINE = "Which is it?\nOptions: A: The cat, on a book., B: The dog., C: 1:2, D: No. 7"
LINES = "Hint: Please answer, e.g., A, B, C, D.\nQuestion: What is (A) plus (B)?\nChoices:\n(A) 11\n(B) 9\n(C) 4\n(D) 8"


def row(index: int, **changes: Any) -> dict[str, Any]:
    return {
        "index": index,
        "question": INLINE,
        "image": b"jpeg",
        "answer": "B",
        "category": "math",
        "l2_category": "geometry",
        "meta_info": {"source": "MathVista", "split": "testmini", "image_path": "images/0.jpg"},
    } | changes


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), folder / "mmstar.parquet")
    return folder


def question(number: int, task: str, answer: str = "A") -> Question:
    return Question(f"MMStar/{number}", task, "", b"", "?", ("", "", "", ""), answer, "?")


@pytest.mark.parametrize("image", [b"jpeg", {"bytes": b"jpeg", "path": None}])
def test_reads_the_published_layout(tmp_path: Path, image: Any) -> None:
    questions = mmstar.load(write(tmp_path, [row(3, image=image), row(4, answer=" d ".upper(), image=image)]))
    assert [q.id for q in questions] == ["MMStar/3", "MMStar/4"]
    assert [q.answer for q in questions] == ["B", "D"]
    assert questions[0].task == "math"
    assert questions[0].source == "geometry"
    assert questions[0].image == b"jpeg"
    assert questions[0].choices == ("The cat, on a book.", "The dog.", "1:2", "No. 7")
    assert mmstar.build_prompt(questions[0].prompt) == (
        f"<image>\n{INLINE}\nAnswer with the option's letter from the given choices directly"
    )


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        (INLINE, ("The cat, on a book.", "The dog.", "1:2", "No. 7")),
        (LINES, ("11", "9", "4", "8")),
        ("Is it?\nOptions: A: Yes, B: No, C: nan, D: nan", ("Yes", "No")),
        ("Is it?\nOptions: A: Yes, B: No", ("Yes", "No")),
        ("Which?\nA. x\nB. y\nC. z\nD. w", ("x", "y", "z", "w")),
        ("Which vitamin?\nOptions: A: vitamin A: retinol, B: b, C: c, D: d", ("vitamin A: retinol", "b", "c", "d")),
        ("Which letter is shown?", ("", "", "", "")),
        ("Options: A: nan, B: nan, C: nan, D: nan", ("", "", "", "")),
    ],
)
def test_options_are_found_in_the_question(text: str, choices: tuple[str, ...]) -> None:
    assert mmstar.choices_of(text) == choices


words = st.lists(st.text(st.characters(categories=["Ll", "Nd"]), min_size=1, max_size=6), min_size=1, max_size=4)


@given(
    texts=st.lists(words.map(" ".join).filter(lambda text: text != "nan"), min_size=2, max_size=4),
    layout=st.sampled_from(["inline", "lines"]),
)
def test_options_are_found_however_many_there_are(texts: list[str], layout: str) -> None:
    if layout == "inline":
        listed = "Options: " + ", ".join(f"{letter}: {text}" for letter, text in zip("ABCD", texts, strict=False))
    else:
        listed = "Choices:\n" + "\n".join(f"({letter}) {text}" for letter, text in zip("ABCD", texts, strict=False))
    assert mmstar.choices_of(f"What is it?\n{listed}") == tuple(texts)


@given(st.text(max_size=80))
def test_any_question_has_two_to_four_choices(text: str) -> None:
    choices = mmstar.choices_of(text)
    assert 2 <= len(choices) <= 4
    assert all(choices) or choices == ("",) * 4 or "" in choices[:-1]


def test_an_answer_beyond_the_options_found_leaves_only_letters(tmp_path: Path) -> None:
    found = mmstar.load(write(tmp_path, [row(0, question="Is it?\nOptions: A: Yes, B: No", answer="D")]))
    assert found[0].choices == ("", "", "", "")


def test_limit_keeps_the_proportions(tmp_path: Path) -> None:
    folder = write(tmp_path, [row(i, category=mmstar.TASKS[i // 10]) for i in range(60)])
    found = mmstar.load(folder, limit=12)
    assert [sum(q.task == task for q in found) for task in mmstar.TASKS] == [2] * 6
    assert len(mmstar.load(folder, limit=1000)) == 60


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"answer": "E"}, "answer is 'E', expected one of A, B, C, D"),
        ({"answer": None}, "answer is None"),
        ({"category": "colour"}, "category is 'colour', expected coarse perception or"),
        ({"question": ""}, "question is '', expected a text"),
        ({"image": b""}, "image is b'', expected the encoded image"),
        ({"image": {"bytes": None, "path": "a.jpg"}}, "expected the encoded image, or a struct"),
    ],
)
def test_broken_rows_are_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = write(tmp_path, [row(7, **changes)])
    with pytest.raises(OlaError) as error:
        mmstar.load(folder)
    assert "mmstar.parquet: index 7: " in str(error.value)
    assert words in str(error.value)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(OlaError, match=r"mmstar\.parquet: no such file.*Lin-Chen/MMStar"):
        mmstar.load(tmp_path)
    with pytest.raises(OlaError, match="index 0 stands there twice"):
        mmstar.load(write(tmp_path, [row(0), row(0)]))
    less = row(0)
    del less["category"], less["image"]
    with pytest.raises(OlaError, match=r"mmstar\.parquet: no column image, category; found index, "):
        mmstar.load(write(tmp_path, [less]))
    (tmp_path / "mmstar.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(OlaError, match=r"mmstar\.parquet: not a readable Parquet file"):
        mmstar.load(tmp_path)


def test_scores_by_hand() -> None:
    # One question of five categories, all right; four of the sixth: one right, one wrong, two unanswered.
    asked = [question(i, task) for i, task in enumerate([*mmstar.TASKS[:5], *["math"] * 4])]
    answers = {q.id: reply for q, reply in zip(asked, ["A"] * 6 + ["B", None, None], strict=True)}
    scores = mmstar.score(asked, answers)
    assert list(scores) == list(mmstar.ROWS)
    macro, micro, math_ = scores["macro"], scores["micro"], scores["math"]
    assert macro is not None
    assert micro is not None
    assert math_ is not None
    assert math_["accuracy"] == 1 / 4
    assert math_["answered"] == 1 / 2
    assert macro["accuracy"] == pytest.approx((5 + 1 / 4) / 6)  # categories weigh the same
    assert micro["accuracy"] == 6 / 9  # questions weigh the same
    assert macro["stderr"] == pytest.approx(math.sqrt(1 / 4 * 3 / 4 / 4) / 6)
    assert (macro["n"], macro["answered"]) == (9, 7 / 9)
    with pytest.raises(OlaError, match="1 of 9 questions have no reply: MMStar/0"):
        mmstar.score(asked, {key: value for key, value in answers.items() if key != "MMStar/0"})


def test_what_was_not_asked_has_no_score() -> None:
    asked = [question(0, "math")]
    scores = mmstar.score(asked, {"MMStar/0": "A"})
    assert scores["macro"] is None
    assert scores["coarse perception"] is None
    assert scores["math"] == scores["micro"]
    assert mmstar.expected(asked, {"MMStar/0": 0.25}) == {"micro": 0.25, "math": 0.25}
    assert mmstar.expected([], {}) == {}


@given(st.lists(st.tuples(st.sampled_from(mmstar.TASKS), st.booleans()), min_size=1))
def test_the_expected_score_of_one_who_knows_is_the_score(rows: list[tuple[str, bool]]) -> None:
    asked = [question(i, task) for i, (task, _) in enumerate(rows)]
    scores = mmstar.score(asked, {q.id: "A" if right else None for q, (_, right) in zip(asked, rows, strict=True)})
    expected = mmstar.expected(asked, {q.id: float(right) for q, (_, right) in zip(asked, rows, strict=True)})
    assert expected == {name: pytest.approx(cell["accuracy"]) for name, cell in scores.items() if cell}
