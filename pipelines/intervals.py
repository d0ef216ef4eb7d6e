"""95 % intervals of what a report compares: accuracies, and differences between two students asked the same."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from olavlm.eval.benchmarks import Benchmark
from olavlm.eval.bootstrap import Estimate, bootstrap_mean
from olavlm.eval.cv_bench import Cell, Question

_Z = 1.959964  # standard normal, 97.5 %
RESAMPLES = 10_000


def wilson(cell: Cell) -> Estimate:
    """An accuracy with Wilson's score interval (Wilson 1927), which stays in [0, 1] and has a width at 0 and 1, too.

    A mean of accuracies, as CV-Bench's overall, gets that of the number of questions at which its standard error would
    be binomial; for a plain share that is `n` itself.
    """
    share, stderr = cell["accuracy"], cell["stderr"]
    n = share * (1 - share) / stderr**2 if stderr else cell["n"]
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + (_Z / (2 * n)) ** 2)
    return Estimate(share, min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share))


def paired(
    benchmark: Benchmark, questions: Sequence[Question], first: Mapping[str, bool], second: Mapping[str, bool]
) -> dict[str, Estimate]:
    """How much better the second student is than the first, question by question, by the benchmark's rows.

    A paired bootstrap: questions are resampled with both students' replies, `RESAMPLES` times, within the parts that
    the benchmark weighs apart; the interval is from the 2.5th to the 97.5th percentile. The same arguments give the
    same interval.

    Args:
        benchmark: its aggregation is that of the rows.
        questions: what both were asked.
        first: whether the first student was right, by question id.
        second: the same of the second.
    """
    rng = np.random.default_rng(0)
    estimates: dict[str, float] = defaultdict(float)
    samples: dict[str, np.ndarray] = {}
    for weights, ids in _parts(benchmark, questions).items():
        gained = np.array([int(second[i]) - int(first[i]) for i in ids])
        kinds = [-1, 0, 1]
        shares = [np.mean(gained == kind) for kind in kinds]
        resampled = rng.multinomial(len(ids), shares, size=RESAMPLES) @ kinds  # sums of resampled gains
        for row, weight in weights:
            estimates[row] += weight * gained.sum()
            samples[row] = samples.get(row, 0) + weight * resampled
    return {row: _percentiles(estimates[row], samples[row]) for row in benchmark.expected(questions, _all(questions))}


def paired_mean(first: Mapping[str, float], second: Mapping[str, float]) -> Estimate:
    """The mean of second − first over the keys that both have, by a bootstrap of these differences."""
    return bootstrap_mean([second[key] - first[key] for key in sorted(first.keys() & second.keys())])


def _percentiles(value: float, samples: np.ndarray) -> Estimate:
    low, high = np.percentile(samples, [2.5, 97.5])
    return Estimate(float(value), float(low), float(high))


def _all(questions: Sequence[Question]) -> dict[str, float]:
    return {question.id: 1.0 for question in questions}


def _parts(benchmark: Benchmark, questions: Sequence[Question]) -> dict[tuple[tuple[str, float], ...], list[str]]:
    """Question ids by what one of them counts for in every row; a row is a weighted sum over the questions."""
    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for question in questions:
        kinds[question.task, question.source].append(question.id)
    parts: dict[tuple[tuple[str, float], ...], list[str]] = defaultdict(list)
    for ids in kinds.values():
        right = dict.fromkeys(_all(questions), 0.0) | dict.fromkeys(ids, 1.0)
        rows = benchmark.expected(questions, right)
        parts[tuple((row, round(value / len(ids), 12)) for row, value in rows.items() if value)] += ids
    return parts
