"""What can be had without depth: a model of two-dimensional cues, and the single ones a person would name.

Objects lower in the image, bigger, or off a pedestal tend to be closer; a student that learns this much answers 3-D
questions without depth. So questions are chosen such that a fitted model of the named objects' 2-D boxes cannot tell
their answers (`matching`), and what cues still score is printed beside the student's (`benchmark`). The model is
fitted by `train_cues` on many more scenes than anyone would render for a benchmark, and ships with the weights.
"""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from pipelines.demo_world.questions import Question, View

Array = NDArray[np.float32]
WEIGHTS = Path(__file__).parent / "weights" / "cues" / "model.safetensors"
THREE_D = ("Depth", "Distance")
SINGLE_CUES = ("height", "size", "pedestal", "image distance")


def scores(questions: Sequence[Question]) -> Array:
    """Log odds the cue model gives to the object named first of the two that are compared, (n,) float32.

    0 where there is nothing to choose by cues: tasks that are not in `THREE_D`.
    """
    found = np.zeros(len(questions), np.float32)
    for task in THREE_D:
        rows = [row for row, question in enumerate(questions) if question.task == task]
        if rows:
            asked = [questions[row] for row in rows]
            found[rows] = _network(task, features(asked)) - _network(task, features([q.turned() for q in asked]))
    return found


def features(questions: Sequence[Question]) -> Array:
    """What boxes tell about the objects named, questions of one task: (n, 12) of Depth, (n, 30) of Distance, float32.

    Of every object the centre, foot, top, width, height and whether it is on a pedestal; of distances also how far
    each of the two is from the third in all of these but the last, and in the image.
    """
    left, top, right, bottom, raised = np.moveaxis(np.array([q.views for q in questions], np.float32), -1, 0)
    objects = np.stack([(left + right) / 2 - 0.5, bottom - 0.5, top - 0.5, right - left, bottom - top, raised], axis=-1)
    columns = list(np.moveaxis(objects, 1, 0))
    if questions[0].task == "Distance":
        for other in columns[1:3]:
            offset = np.abs(other - columns[0])[:, :5]
            columns += [offset, np.hypot(offset[:, :1], offset[:, 1:2])]
    return np.concatenate(columns, axis=1)


def single_cues(question: Question) -> dict[str, float]:
    """By cue, how much more it speaks for the object named first of the two that are compared; 0: not at all.

    Of depth: lower in the image (``height``), bigger, on a pedestal. Of distance: more like the third object in these,
    or nearer to it in the image (``image distance``). Which way a cue points is for the user to fit.
    """

    def seen(view: View) -> tuple[float, float, float, complex]:
        left, top, right, bottom, raised = view
        return bottom, math.log((right - left) * (bottom - top)), raised, complex((left + right) / 2, bottom)

    *third, first, second = (seen(view) for view in question.views)
    if third:
        towards = [abs(b - c) - abs(a - c) for a, b, c in zip(first, second, third[0], strict=True)]
    else:
        towards = [*(a - b for a, b in zip(first[:3], second[:3], strict=True)), 0.0]
    return dict(zip(SINGLE_CUES, towards, strict=True))


def first_is_right(questions: Sequence[Question]) -> NDArray[np.bool_]:
    """Whether the object named first of the two that are compared is the answer, (n,) bool; tasks in `THREE_D`."""
    return np.array([q.choices[q.answer] == q.names[-2] for q in questions])


@cache
def _weights() -> dict[str, Array]:
    return load_file(WEIGHTS)


def _network(task: str, x: Array) -> Array:
    """The cue model's two hidden layers, (n, d) → (n,)."""
    w = _weights()
    for layer in range(3):
        x = (np.maximum(x, 0) if layer else x) @ w[f"{task}.{layer}.weight"].T + w[f"{task}.{layer}.bias"]
    return x[:, 0]
