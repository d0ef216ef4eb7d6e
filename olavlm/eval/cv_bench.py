"""CV-Bench (Tong et al. 2024, hub id ``nyu-visionx/CV-Bench``): reading its Parquet files, its prompts, its scores."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from string import ascii_uppercase
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from olavlm.errors import OlaError

FILES = {"2D": "test_2d.parquet", "3D": "test_3d.parquet"}
TASKS = ("Count", "Relation", "Depth", "Distance")
#: Names of what people quote, aggregates first.
ROWS = ("overall", "2D", "3D", "micro", *TASKS)
SOURCES = ("ADE20K", "COCO", "Omni3D")
COLUMNS = ("idx", "type", "task", "image", "question", "choices", "answer", "prompt", "source")

#: An accuracy with its standard error, number of questions and share of them that was answered.
Cell = dict[str, float | int]

#: Appended to the dataset's `prompt` on a line of its own, as in the published runs.
SUFFIX = "Only answer the option as the output. For example, if your answer is the option A, answer (A)."


@dataclass(frozen=True)
class Question:
    """One row of the benchmark."""

    id: str  # "2D/17": the file's type and the row's idx
    task: str  # one of TASKS
    source: str  # one of SOURCES
    image: bytes  # as stored in the file, encoded
    question: str
    choices: tuple[str, ...]
    answer: str  # a letter
    prompt: str  # the dataset's own: the question and its lettered choices


def build_prompt(prompt: str) -> str:
    """What the student is asked, given the dataset's `prompt` field; the image comes first, on a line of its own."""
    return f"<image>\n{prompt}\n{SUFFIX}"


def load(folder: str | Path, limit: int | None = None) -> list[Question]:
    """Read both files of the published layout; the images stay encoded.

    Args:
        folder: holds ``test_2d.parquet`` and ``test_3d.parquet``.
        limit: only this many questions, evenly spaced over the rows so that every task and source keeps its share.

    Raises:
        OlaError: a file or column is missing, or a row breaks the layout; names the file and the row's idx.
    """
    questions = [question for kind, name in FILES.items() for question in _load_file(Path(folder) / name, kind)]
    if limit is not None and limit < len(questions):
        questions = [questions[i * len(questions) // limit] for i in range(limit)]
    return questions


def _load_file(path: Path, kind: str) -> list[Question]:
    """All questions of one file, in its order."""
    if not path.is_file():
        raise OlaError(
            f"{path}: no such file; CV-Bench is a folder with {' and '.join(FILES.values())} "
            "(hf download nyu-visionx/CV-Bench --repo-type dataset --local-dir …)"
        )
    try:
        file = pq.ParquetFile(path)
        if missing := [column for column in COLUMNS if column not in file.schema_arrow.names]:
            raise OlaError(f"{path}: no column {', '.join(missing)}; found {', '.join(file.schema_arrow.names)}")
        questions: dict[str, Question] = {}
        for batch in file.iter_batches(batch_size=64, columns=list(COLUMNS)):
            for row in batch.to_pylist():
                question = _question(path, kind, row)
                if question.id in questions:
                    raise OlaError(f"{path}: idx {row['idx']} stands there twice")
                questions[question.id] = question
    except pa.ArrowException as error:
        raise OlaError(f"{path}: not a readable Parquet file ({error})") from None
    return list(questions.values())


def _question(path: Path, kind: str, row: Mapping[str, Any]) -> Question:
    """One checked row."""

    def wrong(column: str, expected: str) -> OlaError:
        return OlaError(f"{path}: idx {row['idx']}: {column} is {row[column]!r:.80}, expected {expected}")

    choices = tuple(row["choices"] or ())
    letters = ascii_uppercase[: len(choices)]
    answer = (row["answer"] or "").strip().strip("()")
    if row["type"] != kind:
        raise wrong("type", kind)
    if row["task"] not in TASKS:
        raise wrong("task", " or ".join(TASKS))
    if row["source"] not in SOURCES:
        raise wrong("source", " or ".join(SOURCES))
    if len(choices) < 2:
        raise wrong("choices", "two or more texts")
    if len(answer) != 1 or answer not in letters:
        raise wrong("answer", f"one of {', '.join(f'({letter})' for letter in letters)}")
    if not isinstance(row["image"], dict) or not row["image"].get("bytes"):
        raise wrong("image", "a struct with the encoded image in `bytes`")
    return Question(
        id=f"{kind}/{row['idx']}",
        task=row["task"],
        source=row["source"],
        image=row["image"]["bytes"],
        question=row["question"],
        choices=choices,
        answer=answer,
        prompt=row["prompt"],
    )


def score(questions: Sequence[Question], answers: Mapping[str, str | None]) -> dict[str, Cell | None]:
    """Every CV-Bench number, each under its own name.

    An unanswered question is a wrong one. Accuracies are shares in [0, 1]; standard errors are binomial, and those of
    means of accuracies follow from the independence of their parts. What has no questions (a benchmark cut by `limit`)
    is None, and so is what would be averaged from it.

    Args:
        questions: what was asked.
        answers: the letter read from each reply by question id, None where nothing could be read.

    Returns:
        ``{name: {"accuracy", "stderr", "n", "answered"}}`` with the names of `ROWS` and `SOURCES`. The published
        aggregation is 2D = (ADE20K + COCO) / 2, 3D = Omni3D, overall = (2D + 3D) / 2; micro is the share over all
        questions, what lmms-eval prints; `answered` is the share of replies an option could be read from.

    Raises:
        OlaError: a question without an entry in `answers`.
    """
    if missing := [question.id for question in questions if question.id not in answers]:
        raise OlaError(f"{len(missing)} of {len(questions)} questions have no reply: {', '.join(missing[:5])}")
    sources = {s: _cell((q for q in questions if q.source == s), answers) for s in SOURCES}
    two, three = _mean(sources["ADE20K"], sources["COCO"]), sources["Omni3D"]
    return {
        "overall": _mean(two, three),
        "2D": two,
        "3D": three,
        "micro": _cell(questions, answers),
        **{task: _cell((q for q in questions if q.task == task), answers) for task in TASKS},
        **sources,
    }


def expected(questions: Sequence[Question], right: Mapping[str, float]) -> dict[str, float]:
    """What a guesser is expected to score, by the names of `score`; what has no questions is left out.

    Args:
        questions: what is asked.
        right: the probability that the guesser gets a question right, by question id; ``1 / len(choices)`` for chance.
    """

    def mean(group: Iterable[Question]) -> float | None:
        chances = [right[question.id] for question in group]
        return fmean(chances) if chances else None

    sources = {source: mean(q for q in questions if q.source == source) for source in SOURCES}
    ade, coco, three = sources.values()
    two = None if ade is None or coco is None else (ade + coco) / 2
    rows = {
        "overall": None if two is None or three is None else (two + three) / 2,
        "2D": two,
        "3D": three,
        "micro": mean(questions),
        **{task: mean(q for q in questions if q.task == task) for task in TASKS},
        **sources,
    }
    return {name: value for name, value in rows.items() if value is not None}


def _cell(questions: Iterable[Question], answers: Mapping[str, str | None]) -> Cell | None:
    """Accuracy over `questions`; None if there are none."""
    given = [(answers[question.id], question.answer) for question in questions]
    if not given:
        return None
    n = len(given)
    accuracy = sum(got == right for got, right in given) / n
    return {
        "accuracy": accuracy,
        "stderr": math.sqrt(accuracy * (1 - accuracy) / n),
        "n": n,
        "answered": sum(got is not None for got, _ in given) / n,
    }


def _mean(first: Cell | None, second: Cell | None) -> Cell | None:
    """The unweighted mean of two independent accuracies."""
    if first is None or second is None:
        return None
    n = first["n"] + second["n"]
    return {
        "accuracy": (first["accuracy"] + second["accuracy"]) / 2,
        "stderr": math.hypot(first["stderr"], second["stderr"]) / 2,
        "n": n,
        "answered": (first["answered"] * first["n"] + second["answered"] * second["n"]) / n,
    }
