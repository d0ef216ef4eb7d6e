"""A benchmark in CV-Bench's own Parquet layout, and what can be scored on it without looking at an image."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from olavlm.eval.cv_bench import FILES, TASKS
from pipelines.demo_world.cues import THREE_D
from pipelines.demo_world.language import LETTERS, Question

SCHEMA = pa.schema(
    [
        ("idx", pa.int64()),
        ("type", pa.string()),
        ("task", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("question", pa.string()),
        ("choices", pa.list_(pa.string())),
        ("answer", pa.string()),
        ("prompt", pa.string()),
        ("filename", pa.string()),
        ("source", pa.string()),
    ]
)

#: A question with the name and PNG bytes of its image.
Asked = tuple[Question, str, bytes]


def write_benchmark(asked: Sequence[Asked], fitting: Sequence[Question], out: Path) -> None:
    """Write both Parquet files and ``baselines.json``; the latter comes last, so its presence means complete.

    2-D rows are dealt to the sources ADE20K and COCO in turn, so that the published aggregation has both; 3-D rows
    are Omni3D's.

    Args:
        asked: the benchmark.
        fitting: balanced questions about other scenes, which the baselines are fitted on.
        out: a folder, made if need be.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "idx": idx,
            "type": "3D" if question.task in THREE_D else "2D",
            "task": question.task,
            "image": {"bytes": png, "path": f"{name}.png"},
            "question": question.text,
            "choices": list(question.choices),
            "answer": question.letter,
            "prompt": question.prompt,
            "filename": f"{name}.png",
            "source": "Omni3D" if question.task in THREE_D else ("ADE20K", "COCO")[idx % 2],
        }
        for idx, (question, name, png) in enumerate(sorted(asked, key=lambda a: TASKS.index(a[0].task)))
    ]
    for kind, file in FILES.items():
        pq.write_table(pa.Table.from_pylist([r for r in rows if r["type"] == kind], SCHEMA), out / file)
    baselines = fit_baselines([q for q, _, _ in asked], fitting)
    (out / "baselines.json").write_text(json.dumps(baselines, indent=1) + "\n")


def fit_baselines(asked: Sequence[Question], fitting: Sequence[Question]) -> dict[str, dict[str, float]]:
    """Accuracies by task of answerers that see no image.

    ``chance``: guessing. ``blind``: a bag of words of question and lettered choices, fitted. ``2-D boxes``: knows
    every object's name, visible box and whether it is on a pedestal, but no depth: counts and relations follow, depth
    and distance are fitted. Only above the last do 3-D answers prove that depth is used.
    """
    by_task = {task: [q for q in asked if q.task == task] for task in TASKS}
    known = {task: [q for q in fitting if q.task == task] for task in TASKS}
    return {
        "chance": {t: float(np.mean([1 / len(q.choices) for q in by_task[t]])) for t in TASKS},
        "blind": {t: _blind(known[t], by_task[t]) for t in TASKS},
        "2-D boxes": {t: _boxes(known[t], by_task[t]) if t in THREE_D else 1.0 for t in TASKS},
    }


def _blind(known: Sequence[Question], asked: Sequence[Question]) -> float:
    """Accuracy of logistic regression on words."""
    vectorizer = CountVectorizer(analyzer=_words)
    model = LogisticRegression(C=0.1, max_iter=2000).fit(vectorizer.fit_transform(known), [q.answer for q in known])
    return float(model.score(vectorizer.transform(asked), [q.answer for q in asked]))


def _words(question: Question) -> list[str]:
    """Words of the question, and each choice together with its letter."""
    choices = [f"{letter}={choice}" for letter, choice in zip(LETTERS, question.choices, strict=False)]
    return [*re.findall(r"\w+", question.text), *choices]


def _boxes(known: Sequence[Question], asked: Sequence[Question]) -> float:
    """Accuracy of a small neural network on the boxes of the objects named."""

    def views(questions: Sequence[Question]) -> list[list[float]]:
        return [[v for view in q.views for v in view] for q in questions]

    network = MLPClassifier((48,), alpha=0.1, max_iter=100, early_stopping=True, random_state=0)
    model = make_pipeline(StandardScaler(), network).fit(views(known), [q.first for q in known])
    return float(model.score(views(asked), [q.first for q in asked]))
