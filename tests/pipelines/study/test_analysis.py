"""The study's numbers: what is right, and intervals over seeds and images."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from olavlm.errors import OlaError
from olavlm.eval.bootstrap import Estimate
from olavlm.eval.cv_bench import Question
from pipelines.study.analysis import Asked, by_group, detectable, interval, over_seeds, two_way

GROUPS = {"2-D": ["Count", "Relation"], "Depth": ["Depth"]}


def question(number, task, image):
    return Question(f"q{number}", task, "ADE20K", image, "?", ("a", "b"), "A", "?")


ASKED = Asked.of([question(0, "Count", b"x"), question(1, "Depth", b"y"), question(2, "Relation", b"x")])


@settings(max_examples=25, deadline=None)
@given(arrays(float, st.tuples(st.integers(1, 4), st.integers(1, 12)), elements=st.sampled_from([-1.0, 0.0, 1.0])))
def test_the_interval_holds_the_mean_and_turns_with_the_sign(values):
    images = np.arange(values.shape[1]) // 2
    found, turned = two_way(values, images), two_way(-values, images)
    assert found.value == pytest.approx(values.mean())
    assert values.min() <= found.low <= found.high <= values.max()
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low), abs=0.05)


def test_what_never_varies_has_no_width_and_what_an_image_is_called_does_not_matter():
    values = np.ones((3, 8))
    assert (two_way(values, np.arange(8)).low, two_way(values, np.arange(8)).high) == (1, 1)
    values[:, :4] = 0
    images = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    assert two_way(values, images) == two_way(values, images + 5)


def test_the_interval_is_wider_where_questions_share_images_and_where_seeds_differ():
    rng = np.random.default_rng(0)
    per_image = rng.integers(0, 2, 100).repeat(4)[None].astype(float)
    alone, shared = two_way(per_image, np.arange(400)), two_way(per_image, np.arange(400) // 4)
    assert shared.high - shared.low > 1.5 * (alone.high - alone.low)
    alike = rng.integers(0, 2, (5, 400)).astype(float)
    differing = alike * np.array([0, 0.25, 0.5, 0.75, 1])[:, None]
    narrow, wide = two_way(alike, np.arange(400)), two_way(differing, np.arange(400))
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


@pytest.mark.parametrize("students", [3, 5])
@pytest.mark.parametrize(("of_seed", "of_image", "left"), [(0, 0.3, 0.6), (0.03, 0.3, 0.6), (0.3, 0.1, 0.2)])
def test_the_interval_covers_the_truth_as_often_as_it_says(students, of_seed, of_image, left):
    """Whether questions or seeds differ more; also of three students, where a bootstrap alone is too narrow."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        values = rng.normal(0, of_seed, (students, 1)) + rng.normal(0, of_image, (1, 60))
        found = interval(values + rng.normal(0, left, (students, 60)), np.arange(60))
        covered += found.low <= 0 <= found.high
    assert covered >= 0.93 * 200


def test_a_t_interval_over_seeds_is_that_of_the_textbook():
    found = over_seeds(np.array([[1.0, 3], [2, 4], [4, 6]]))
    assert (found.low, found.high) == pytest.approx(stats.ttest_1samp([2, 3, 5], 0).confidence_interval())


def test_gains_are_kept_apart_by_task():
    found = by_group(np.array([[0.0, 1, 1], [0, 0, 1]]), ASKED, GROUPS)
    assert found["2-D"] == Estimate(0.5, 0.5, 0.5)  # both questions are about one image, and both seeds agree
    assert found["Depth"].value == 0.5
    assert found["Depth"].low < 0 < 1 < found["Depth"].high


def test_a_gain_as_large_as_is_called_detectable_is_found_in_eight_of_ten_studies():
    rng = np.random.default_rng(2)
    size = detectable(np.array([[-1.0, 0, 1]]).T / np.std([-1, 0, 1], ddof=1), np.zeros(1, int))  # of seeds 1 apart
    found = [over_seeds(rng.normal(size, 1, (3, 1))) for _ in range(2000)]
    assert sum(estimate.low > 0 for estimate in found) / 2000 == pytest.approx(0.8, abs=0.03)


def test_a_gain_is_called_detectable_by_the_interval_that_decides_not_by_its_narrower_half():
    """Where all seeds' students are equally good, but images differ, the t interval alone would find anything."""
    rng = np.random.default_rng(3)
    images = np.arange(300)

    def study(gain):
        return gain + rng.normal(0, 0.5, (1, 300)) + rng.normal(0, 0.05, (5, 300))

    size = np.mean([detectable(study(0), images) for _ in range(10)])
    found = [interval(study(size), images) for _ in range(100)]
    assert 0.7 <= np.mean([estimate.low > 0 for estimate in found]) <= 0.95


def line(number, reply, parsed, answer="A"):
    return {"id": f"q{number}", "reply": reply, "choices": ["red object", "2"], "parsed": parsed, "answer": answer}


def test_replies_are_read_by_question_and_a_missing_one_is_named(tmp_path):
    file = tmp_path / "replies.jsonl"
    lines = [line(2, "red blue: 2 (A)", "A"), line(0, "red object (B)", "B"), line(1, "", None)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = ASKED.read(file)
    assert found.right.tolist() == [0, 0, 1]
    assert found.named.tolist() == [1, 0, 0]  # "red object" is the right choice's words, (B) is not its letter
    assert found.fits.tolist() == [0, 0, 0]
    file.write_text("".join(json.dumps(line(i, "red object (A).", "A")) + "\n" for i in range(3)))
    assert ASKED.read(file).fits.tolist() == [1, 1, 1]
    file.write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(OlaError, match=r"replies.jsonl: no reply to question q0 and 1 more"):
        ASKED.read(file)
