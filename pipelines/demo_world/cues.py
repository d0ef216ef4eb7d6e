"""What can be had without depth: a model of two-dimensional cues, and choosing questions it cannot answer.

Objects lower in the image, bigger, or off a pedestal tend to be closer; a student that learns this much answers 3-D
questions without depth. So questions are chosen such that a fitted model of the named objects' 2-D boxes is as often
wrong as right at every level of its confidence, and its score is printed beside the student's.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipelines.demo_world.language import Question, balance

Array = NDArray[np.float64]
THREE_D = ("Depth", "Distance")


class BoxModel:
    """Logistic regression on quadratic features of boxes, antisymmetric in the two candidates; one per task."""

    def __init__(self, questions: Sequence[Question]) -> None:
        """Fit on questions of the tasks in `THREE_D`."""
        self.weights: dict[str, Array] = {}
        for task in THREE_D:
            asked = [q for q in questions if q.task == task]
            x = np.array([_features(q) for q in asked])
            self.weights[task] = _fit(x, np.array([q.first for q in asked]))

    def right(self, questions: Sequence[Question]) -> Array:
        """The probability it gives to each question's right answer, (n,)."""
        scores = np.array([_features(q) @ self.weights[q.task] * (1 if q.first else -1) for q in questions])
        right: Array = 1 / (1 + np.exp(-np.clip(scores, -30, 30)))
        return right


def without_cues(
    questions: Sequence[Question], rng: np.random.Generator, reference: Sequence[Question] | None = None
) -> list[Question]:
    """The 3-D questions on which fitted `BoxModel`s are as often wrong as right, at every level of confidence.

    Args:
        questions: any; only those of the tasks in `THREE_D` are looked at, and their order is kept.
        rng: which of several equally good ones stay.
        reference: what the models are fitted on, a larger pool for example; default: the questions themselves.
    """
    kept = [q for q in questions if q.task in THREE_D]
    pool = kept if reference is None else [q for q in reference if q.task in THREE_D]
    for _ in range(2):
        model = BoxModel(pool)
        evened = _even(pool, model, rng)
        kept = evened if pool is kept else _even(kept, model, rng)
        pool = evened
    return kept


def _even(questions: list[Question], model: BoxModel, rng: np.random.Generator) -> list[Question]:
    right = model.right(questions)
    level = np.minimum(np.abs(right - 0.5) * 20, 7).astype(int)
    rows = balance(
        range(len(questions)),
        lambda i: (questions[i].task, int(level[i])),
        lambda i: bool(right[i] > 0.5),
        (True, False),
        rng,
    )
    return [questions[i] for i in rows]


def _features(question: Question) -> Array:
    """Difference of the two candidates' features, the first-named minus the second."""
    if question.task == "Depth":
        first, second = (_view(v) for v in question.views)
    else:
        anchor, a, b = (_view(v) for v in question.views)
        first, second = _apart(anchor, a), _apart(anchor, b)
    return _quadratic(first) - _quadratic(second)


def _view(view: tuple[float, ...]) -> Array:
    """Centre, foot, top, width, height in the image, and whether it stands on a pedestal, (6,)."""
    left, top, right, bottom, raised = view
    return np.array([(left + right) / 2 - 0.5, bottom - 0.5, top - 0.5, right - left, bottom - top, raised])


def _apart(anchor: Array, other: Array) -> Array:
    offset = np.abs(anchor - other)
    return np.array([*offset, np.hypot(offset[0], offset[1]), np.hypot(offset[0], offset[2]), *other[3:5]])


def _quadratic(v: Array) -> Array:
    return np.array([*v, *(a * b for a, b in itertools.combinations_with_replacement(v, 2))])


def _fit(x: Array, y: NDArray[np.bool_], penalty: float = 0.1, steps: int = 15) -> Array:
    """Newton's method for logistic regression without intercept on x (n, d), y (n,)."""
    w = np.zeros(x.shape[1])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(x @ w, -30, 30)))
        hessian = (x * (p * (1 - p))[:, None]).T @ x + penalty * np.eye(len(w))
        w = w - np.linalg.solve(hessian, x.T @ (p - y) + penalty * w)
    return w
