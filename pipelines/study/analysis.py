"""What a study's students answered, as numbers with intervals."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from olavlm.data.corpus import content_hash
from olavlm.errors import OlaError
from olavlm.eval.bootstrap import LEVEL, RESAMPLES, Estimate
from olavlm.eval.cv_bench import Question

Array = NDArray[Any]


@dataclass(frozen=True)
class Asked:
    """A benchmark as a study sees it: which questions are of which task, and about which image."""

    ids: list[str]
    tasks: Array  # (questions,) of str
    images: Array  # (questions,) int: questions with the same number are about the same image

    @classmethod
    def of(cls, questions: Sequence[Question]) -> "Asked":
        """What was asked, in the benchmark's order."""
        hashes = [content_hash(question.image) for question in questions]
        _, images = np.unique(hashes, return_inverse=True)
        return cls([q.id for q in questions], np.array([q.task for q in questions]), images)

    def read(self, replies: Path) -> Array:
        """(questions,) float: 1 where the reply is right, from a run's ``replies.jsonl``.

        Raises:
            OlaError: a question has no reply there.
        """
        lines = [json.loads(line) for line in replies.read_text().splitlines()]
        right = {line["id"]: float(line["parsed"] == line["answer"]) for line in lines}
        if missing := [key for key in self.ids if key not in right]:
            raise OlaError(f"{replies}: no reply to question {missing[0]} and {len(missing) - 1} more; ask again")
        return np.array([right[key] for key in self.ids])

    def stack(self, replies: Iterable[Path]) -> Array:
        """(students, questions) float, as `read` gives each."""
        return np.stack([self.read(file) for file in replies])


def stack_cosines(probed: Sequence[tuple[Mapping[str, str], Path]]) -> dict[str, dict[int, dict[str, Array]]]:
    """Task → layer → arm → (seeds, images) cosines; every seed holds out the same images.

    Args:
        probed: for each seed the name of every arm's student in ``cosines.parquet``, and that file.
    """
    found: dict[str, dict[int, dict[str, list[Array]]]] = {}
    for students, file in probed:
        table = pq.read_table(file)
        for arm, student in students.items():
            own = table.filter(pc.equal(table["student"], student)).sort_by("key")
            for task, layer in {*zip(own["task"].to_pylist(), own["layer"].to_pylist(), strict=True)}:
                rows = own.filter(pc.and_(pc.equal(own["task"], task), pc.equal(own["layer"], layer)))
                of_layer = found.setdefault(task, {}).setdefault(layer, {})
                of_layer.setdefault(arm, []).append(rows["cosine"].to_numpy())
    return {
        task: {layer: {arm: np.stack(values) for arm, values in of_task[layer].items()} for layer in sorted(of_task)}
        for task, of_task in found.items()
    }


def two_way(values: Array, images: Array) -> Estimate:
    """The mean of `values` over students and questions, with an interval over both.

    A two-way percentile bootstrap (Owen 2007, The pigeonhole bootstrap): students are resampled and, independently,
    images, each with all its questions. So the interval covers that another seed would have given another student,
    and another draw of scenes other questions. For a paired comparison `values` are differences.

    Args:
        values: (students, questions), students of different seeds.
        images: (questions,) int, which image a question is about.
    """
    students, _ = values.shape
    onto = np.zeros((images.max() + 1, len(images)))
    onto[images, np.arange(len(images))] = 1
    onto = onto[onto.any(1)]
    sums, counts = values @ onto.T, onto.sum(1)  # (students, images), (images,)
    rng = np.random.Generator(np.random.PCG64(0))
    of_students = rng.multinomial(students, np.full(students, 1 / students), size=RESAMPLES)
    of_images = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=RESAMPLES)
    totals = ((of_students @ sums) * of_images).sum(1)
    means = totals / (students * (of_images @ counts))
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return Estimate(float(values.mean()), low, high)


def accuracies(
    right: Mapping[str, Array], asked: Asked, groups: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Estimate]]:
    """Arm → group of tasks → accuracy with its interval.

    Args:
        right: (students, questions) by arm.
        asked: the benchmark.
        groups: tasks by the name of a group; every question of a group counts once.
    """
    return {
        arm: {name: _within(values, asked, tasks) for name, tasks in groups.items()} for arm, values in right.items()
    }


def gains(
    right: Mapping[str, Array], asked: Asked, groups: Mapping[str, Sequence[str]], pairs: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], dict[str, Estimate]]:
    """(arm, other) → group of tasks → how much more often the arm is right, seed by seed and question by question.

    Args:
        right: (students, questions) by arm, students in the order of their seeds.
        asked: the benchmark.
        groups: tasks by the name of a group.
        pairs: what is compared.
    """
    return {
        (arm, other): {name: _within(right[arm] - right[other], asked, tasks) for name, tasks in groups.items()}
        for arm, other in pairs
    }


def _within(values: Array, asked: Asked, tasks: Sequence[str]) -> Estimate:
    of_group = np.isin(asked.tasks, tasks)
    return two_way(values[:, of_group], asked.images[of_group])
