"""MMStar (Chen et al. 2024, arXiv 2403.20330, hub id ``Lin-Chen/MMStar``): its Parquet file, prompts, scores."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from string import ascii_uppercase
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from olavlm.errors import OlaError
from olavlm.eval import cv_bench
from olavlm.eval.cv_bench import Cell, Question

FILE = "mmstar.parquet"
#: The benchmark's `category`; 250 questions each.
TASKS = (
    "coarse perception",
    "fine-grained perception",
    "instance reasoning",
    "logical reasoning",
    "science & technology",
    "math",
)
#: Names of what people quote, aggregates first.
ROWS = ("macro", "micro", *TASKS)
COLUMNS = ("index", "question", "image", "answer", "category", "l2_category")

#: Appended to the question on a line of its own, as lmms-eval does.
SUFFIX = "Answer with the option's letter from the given choices directly"

_OPTIONS = 4  # of every question
_LABEL = r"(?:\({0}\)|(?<![\w(]){0}[:.)](?=\s))"  # "(A)", or "A:" and its like


def build_prompt(prompt: str) -> str:
    """What the student is asked, given the dataset's `question` field; the image comes first, on a line of its own."""
    return f"<image>\n{prompt}\n{SUFFIX}"


def load(folder: str | Path, limit: int | None = None) -> list[Question]:
    """Read the published file; the images stay encoded.

    Args:
        folder: holds ``mmstar.parquet``.
        limit: only this many questions, evenly spaced over the rows so that every category keeps its share.

    Returns:
        In the file's order; `task` is a row's category, `source` its l2_category, and `choices` are the options that
        its question ends with (see `choices_of`).

    Raises:
        OlaError: the file or a column is missing, or a row breaks the layout; names the file and the row's index.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise OlaError(
            f"{path}: no such file; MMStar is a folder with {FILE} "
            "(hf download Lin-Chen/MMStar mmstar.parquet --repo-type dataset --local-dir …)"
        )
    try:
        file = pq.ParquetFile(path)
        if missing := [column for column in COLUMNS if column not in file.schema_arrow.names]:
            raise OlaError(f"{path}: no column {', '.join(missing)}; found {', '.join(file.schema_arrow.names)}")
        questions: dict[str, Question] = {}
        for batch in file.iter_batches(batch_size=64, columns=list(COLUMNS)):
            for row in batch.to_pylist():
                question = _question(path, row)
                if question.id in questions:
                    raise OlaError(f"{path}: index {row['index']} stands there twice")
                questions[question.id] = question
    except pa.ArrowException as error:
        raise OlaError(f"{path}: not a readable Parquet file ({error})") from None
    found = list(questions.values())
    if limit is not None and limit < len(found):
        found = [found[i * len(found) // limit] for i in range(limit)]
    return found


def choices_of(question: str) -> tuple[str, ...]:
    """The texts of the options a question ends with: ``Options: A: …, B: …`` or ``(A) …`` on lines of their own.

    Questions with less than four options are filled up with ``nan`` in the file; that is no option. Four blank texts
    where options cannot be told apart: then only a letter can name them.
    """
    listed = re.split(r"\b(?:Options|Choices):", question)[-1]
    for count in range(_OPTIONS, 1, -1):
        labels = r"(.*?)".join(_LABEL.format(letter) for letter in ascii_uppercase[:count])
        if match := re.search(labels + r"(.*)\Z", listed, re.DOTALL):
            texts = [text.strip().rstrip(",").strip() for text in match.groups()]
            while texts and texts[-1].lower() in ("nan", ""):
                texts.pop()
            return tuple(texts) if len(texts) > 1 else ("",) * _OPTIONS
    return ("",) * _OPTIONS


def _question(path: Path, row: Mapping[str, Any]) -> Question:
    """One checked row."""

    def wrong(column: str, expected: str) -> OlaError:
        return OlaError(f"{path}: index {row['index']}: {column} is {row[column]!r:.80}, expected {expected}")

    letters = ascii_uppercase[:_OPTIONS]
    answer = (row["answer"] or "").strip().strip("()")
    image = row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"]  # the hub has had both
    if not row["question"]:
        raise wrong("question", "a text")
    if row["category"] not in TASKS:
        raise wrong("category", " or ".join(TASKS))
    if len(answer) != 1 or answer not in letters:
        raise wrong("answer", f"one of {', '.join(letters)}")
    if not isinstance(image, bytes) or not image:
        raise wrong("image", "the encoded image, or a struct with it in `bytes`")
    choices = choices_of(row["question"])
    return Question(
        id=f"MMStar/{row['index']}",
        task=row["category"],
        source=row["l2_category"],
        image=image,
        question=row["question"],
        choices=choices if answer in letters[: len(choices)] else ("",) * _OPTIONS,
        answer=answer,
        prompt=row["question"],
    )


def score(questions: Sequence[Question], answers: Mapping[str, str | None]) -> dict[str, Cell | None]:
    """Every MMStar number, by the names of `ROWS`.

    macro is the unweighted mean of the six categories, the published average; micro the share over all questions (the
    two agree on the whole benchmark, whose categories are of one size). Otherwise as `cv_bench.score`.

    Args:
        questions: what was asked.
        answers: the letter read from each reply by question id, None where nothing could be read.

    Returns:
        ``{name: {"accuracy", "stderr", "n", "answered"}}``; None for what has no questions.

    Raises:
        OlaError: a question without an entry in `answers`.
    """
    micro = cv_bench.score(questions, answers)["micro"]
    tasks = {task: cv_bench.score([q for q in questions if q.task == task], answers)["micro"] for task in TASKS}
    macro: Cell | None = None
    cells = [cell for cell in tasks.values() if cell]
    if micro and len(cells) == len(TASKS):
        macro = micro | {
            "accuracy": fmean(cell["accuracy"] for cell in cells),
            "stderr": math.hypot(*(cell["stderr"] for cell in cells)) / len(cells),
        }
    return {"macro": macro, "micro": micro, **tasks}


def expected(questions: Sequence[Question], right: Mapping[str, float]) -> dict[str, float]:
    """What a guesser is expected to score, by the names of `score`; what has no questions is left out.

    Args:
        questions: what is asked.
        right: the probability that the guesser gets a question right, by question id; ``1 / len(choices)`` for chance.
    """
    tasks = {task: cv_bench.expected([q for q in questions if q.task == task], right).get("micro") for task in TASKS}
    known = [value for value in tasks.values() if value is not None]
    macro = fmean(known) if len(known) == len(TASKS) else None
    rows = {"macro": macro, "micro": cv_bench.expected(questions, right).get("micro"), **tasks}
    return {name: value for name, value in rows.items() if value is not None}
