"""What a study's students answered, as numbers with intervals."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy import optimize, stats

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

    def read(self, replies: Path) -> "Replies":
        """A run's ``replies.jsonl``.

        Raises:
            OlaError: a question has no reply there.
        """
        found = {line["id"]: line for line in map(json.loads, replies.read_text().splitlines())}
        if missing := [key for key in self.ids if key not in found]:
            raise OlaError(f"{replies}: no reply to question {missing[0]} and {len(missing) - 1} more; ask again")
        rows = []
        for line in (found[key] for key in self.ids):
            named = _named(line["reply"], line["choices"])
            rows.append((line["parsed"] == line["answer"], named == line["answer"], named and named == line["parsed"]))
        return Replies(*np.array(rows, dtype=bool).T.astype(np.float64))


@dataclass(frozen=True)
class Replies:
    """What one student answered; (questions,) float each, 1 for yes."""

    right: Array  # the option it chose is the right one: what counts
    named: Array  # the words before the letter are the right choice's
    fits: Array  # the letter is that of the choice which the words name


def _named(reply: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice that a reply names in words; the demo world's look like ``red blue: 2 (C)``."""
    words = re.sub(r"\s*\([A-Z]\)\W*$", "", reply).rpartition(":")[2].strip()
    return ascii_uppercase[choices.index(words)] if words in choices else None


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
            for task, layer in sorted({*zip(own["task"].to_pylist(), own["layer"].to_pylist(), strict=True)}):
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


def over_seeds(values: Array) -> Estimate:
    """The mean of `values` (students, questions) with Student's t interval over the students' means.

    The questions are taken as given; so it says how sure the mean is for other seeds, however few there are.
    """
    means = values.mean(1)
    half = stats.t.ppf((1 + LEVEL) / 2, len(means) - 1) * means.std(ddof=1) / math.sqrt(len(means))
    return Estimate(float(values.mean()), float(means.mean() - half), float(means.mean() + half))


def interval(values: Array, images: Array) -> Estimate:
    """The mean of `values`, between the outer ends of `two_way` and `over_seeds`.

    Neither alone is enough: of three or five students that differ much, resampling students gives too narrow an
    interval, and that over seeds knows nothing of other questions.

    Args:
        values: (students, questions), two students at least.
        images: (questions,) int, which image a question is about.
    """
    both, seeds = two_way(values, images), over_seeds(values)
    return Estimate(both.value, min(both.low, seeds.low), max(both.high, seeds.high))


def detectable(values: Array, images: Array) -> float:
    """The gain that `interval` would show to differ from 0 in 8 of 10 studies of as many seeds and images, spread so.

    The larger of the two that its parts would show: `over_seeds` by the noncentral t distribution, and `two_way` as if
    its means were normal, with the spread that its width tells of.

    Args:
        values: (students, questions), two students at least.
        images: (questions,) int, which image a question is about.
    """
    means, both = values.mean(1), two_way(values, images)
    n, spread, upper = len(means), float(means.std(ddof=1)), (1 + LEVEL) / 2
    edge = stats.t.ppf(upper, n - 1)
    shift = optimize.brentq(lambda shift: stats.nct.sf(edge, n - 1, shift) - 0.8, 0, 100)
    of_seeds = shift * spread / math.sqrt(n)
    of_both = (both.high - both.low) / 2 * (1 + stats.norm.ppf(0.8) / stats.norm.ppf(upper))
    return float(max(of_seeds, of_both))


def by_group(values: Array, asked: Asked, groups: Mapping[str, Sequence[str]]) -> dict[str, Estimate]:
    """Group of tasks → the mean of `values` with its interval.

    Args:
        values: (students, questions): accuracies, or differences of two arms' accuracies, seed by seed.
        asked: the benchmark.
        groups: tasks by the name of a group; every question of a group counts once.
    """
    found = {}
    for name, tasks in groups.items():
        of_group = np.isin(asked.tasks, tasks)
        found[name] = interval(values[:, of_group], asked.images[of_group])
    return found
