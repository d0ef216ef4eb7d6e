"""Intervals: of an accuracy, and of what one student gains over another on the same questions."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olavlm.eval.benchmarks import BENCHMARKS
from olavlm.eval.bootstrap import Estimate
from olavlm.eval.cv_bench import Question
from pipelines.intervals import paired, paired_mean, wilson

#: Task and source of a question, as both benchmarks have them.
KINDS = {
    "cv_bench": [("Count", "ADE20K"), ("Relation", "COCO"), ("Count", "COCO"), ("Depth", "Omni3D")],
    "mmstar": [("math", "geometry"), ("math", "algebra"), ("coarse perception", "image style")],
}


def question(i: int, kind: tuple[str, str]) -> Question:
    return Question(str(i), *kind, b"", "?", ("1", "2"), "A", "?")


@given(n=st.integers(1, 5000), share=st.floats(0, 1))
def test_a_share_lies_in_its_interval_which_lies_in_0_to_1(n: int, share: float) -> None:
    p = round(share * n) / n
    found = wilson({"accuracy": p, "stderr": math.sqrt(p * (1 - p) / n), "n": n, "answered": 1})
    assert 0 <= found.low <= found.value == p <= found.high <= 1
    assert found.low < found.high
    # Wilson's ends are where the score test just rejects: |p − end| = z √(end (1 − end) / n)
    for end in (found.low, found.high):
        assert abs(p - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), abs=1e-6)


def test_a_mean_of_two_shares_has_the_interval_of_its_standard_error() -> None:
    """Half of 80 % of 100 and 60 % of 400: as if asked as many questions as give this standard error."""
    stderr = math.hypot(math.sqrt(0.8 * 0.2 / 100), math.sqrt(0.6 * 0.4 / 400)) / 2
    found = wilson({"accuracy": 0.7, "stderr": stderr, "n": 500, "answered": 1})
    assert found.low == pytest.approx(0.7 - 1.96 * stderr, abs=0.003)
    assert found.high == pytest.approx(0.7 + 1.96 * stderr, abs=0.003)


@settings(max_examples=40, deadline=None)
@given(key=st.sampled_from(list(KINDS)), data=st.data())
def test_a_gain_is_the_difference_of_the_scores(key: str, data: st.DataObject) -> None:
    kinds = [kind for kind in KINDS[key] for _ in range(data.draw(st.integers(0, 4)))] or KINDS[key][:1]
    questions = [question(i, kind) for i, kind in enumerate(kinds)]
    first, second = ({q.id: data.draw(st.booleans()) for q in questions} for _ in range(2))
    benchmark = BENCHMARKS[key]
    scores = [
        benchmark.score(questions, {i: "A" if right else "B" for i, right in of.items()}) for of in (first, second)
    ]
    found = paired(benchmark, questions, first, second)
    assert (
        found.keys() == {row for row, cell in scores[0].items() if cell} & benchmark.expected(questions, first).keys()
    )
    for row, gain in found.items():
        assert gain.value == pytest.approx(scores[1][row]["accuracy"] - scores[0][row]["accuracy"])
        assert gain.low - 1e-9 <= gain.value <= gain.high + 1e-9 or first != second
    assert all(gain == Estimate(0, 0, 0) for gain in paired(benchmark, questions, first, first).values())


@pytest.mark.parametrize("key", KINDS)
def test_its_interval_is_that_of_paired_differences(key: str) -> None:
    """About ± 1.96 standard errors of the mean difference, however large the parts; never that of unpaired scores."""
    kinds = [KINDS[key][0]] * 300 + [KINDS[key][1]] * 100
    questions = [question(i, kind) for i, kind in enumerate(kinds)]
    rng = random.Random(0)
    first = {q.id: rng.random() < 0.5 for q in questions}
    second = {i: not right if rng.random() < 0.1 else right for i, right in first.items()}
    gained = [second[q.id] - first[q.id] for q in questions]
    mean = sum(gained) / 400
    stderr = math.sqrt(sum((g - mean) ** 2 for g in gained)) / 400
    found = paired(BENCHMARKS[key], questions, first, second)["micro"]
    assert found.value == pytest.approx(mean)
    assert found.high - found.low == pytest.approx(2 * 1.96 * stderr, rel=0.1)
    assert found == paired(BENCHMARKS[key], questions, first, second)["micro"]


def test_means_are_paired_by_key() -> None:
    rng = random.Random(0)
    first = {str(i): rng.random() for i in range(100)}
    second = {key: value + 0.1 + rng.gauss(0, 0.02) for key, value in first.items() if key != "7"} | {"other": 9.0}
    found = paired_mean(first, second)
    assert found.value == pytest.approx(0.1, abs=0.01)
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.02 / 10, rel=0.25)
