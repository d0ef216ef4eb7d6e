"""A benchmark in CV-Bench's own Parquet layout, and what can be scored on it without looking at an image."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from olavlm.eval.cv_bench import FILES, TASKS
from pipelines.demo_world.cues import SINGLE_CUES, THREE_D, features, first_is_right, single_cues
from pipelines.demo_world.matching import Group
from pipelines.demo_world.questions import LETTERS, Question

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


def write_benchmark(
    groups: Sequence[Group], pictures: Mapping[int, tuple[str, bytes]], fitting: Sequence[Question], out: Path
) -> None:
    """Write both Parquet files and ``baselines.json``; the latter comes last, so its presence means complete.

    2-D groups are dealt to the sources ADE20K and COCO in turn, so that the published aggregation has both; 3-D rows
    are Omni3D's.

    Args:
        groups: the benchmark.
        pictures: name and PNG bytes of every scene's image, by the scene's seed.
        fitting: matched questions about other scenes, which the baselines are fitted on.
        out: a folder, made if need be.
    """
    out.mkdir(parents=True, exist_ok=True)
    ordered = sorted(groups, key=lambda group: TASKS.index(group[0].task))
    sourced = [(question, number) for number, group in enumerate(ordered) for question in group]
    rows = []
    for idx, (question, number) in enumerate(sourced):
        name, png = pictures[question.scene]
        rows.append(
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
                "source": "Omni3D" if question.task in THREE_D else ("ADE20K", "COCO")[number % 2],
            }
        )
    for kind, file in FILES.items():
        pq.write_table(pa.Table.from_pylist([r for r in rows if r["type"] == kind], SCHEMA), out / file)
    baselines = fit_baselines([question for question, _ in sourced], fitting)
    (out / "baselines.json").write_text(json.dumps(baselines, indent=1) + "\n")


def fit_baselines(asked: Sequence[Question], fitting: Sequence[Question]) -> dict[str, dict[str, float]]:
    """Accuracies by task, of answerers that see no depth: ``{name: {task: accuracy}}``.

    ``chance``: guessing. ``blind``: a bag of words of question and lettered choices, fitted. ``height``, ``size``,
    ``pedestal``, ``image distance``: one of `single_cues`, whose sign is fitted; it guesses where the cue says nothing,
    as in 2-D tasks. ``2-D boxes``: knows every object's name, visible box and whether it is on a pedestal: counts and
    relations follow, depth and distance are fitted. Only above the last do 3-D answers prove that depth is used.

    Args:
        asked: what is answered, of every task.
        fitting: questions about other scenes, chosen alike.
    """
    by_task = {task: [q for q in asked if q.task == task] for task in TASKS}
    known = {task: [q for q in fitting if q.task == task] for task in TASKS}
    chance = {t: float(np.mean([1 / len(q.choices) for q in by_task[t]])) for t in TASKS}
    return {
        "chance": chance,
        "blind": {t: _blind(known[t], by_task[t]) for t in TASKS},
        **{cue: chance | {t: _single(cue, known[t], by_task[t]) for t in THREE_D} for cue in SINGLE_CUES},
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


def _single(cue: str, known: Sequence[Question], asked: Sequence[Question]) -> float:
    """Accuracy of one cue: always, or never, the candidate that has more of it; a draw is half right."""

    def agrees(questions: Sequence[Question]) -> float:
        towards = np.array([single_cues(q)[cue] for q in questions])
        return float(np.mean(np.where(towards == 0, 0.5, (towards > 0) == first_is_right(questions))))

    return agrees(asked) if agrees(known) >= 0.5 else 1 - agrees(asked)


def _boxes(known: Sequence[Question], asked: Sequence[Question]) -> float:
    """Accuracy of gradient boosting on the boxes of the objects named, seen from both candidates."""
    model = HistGradientBoostingClassifier(learning_rate=0.05, max_leaf_nodes=15, early_stopping=True, random_state=0)
    both = [*known, *(q.turned() for q in known)]
    model.fit(features(both), first_is_right(both))
    odds = model.decision_function(features(asked)) - model.decision_function(features([q.turned() for q in asked]))
    return float(np.mean((odds > 0) == first_is_right(asked)))
