"""Intervals over images."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from olavlm.errors import OlaError
from olavlm.eval.bootstrap import Estimate, bootstrap, bootstrap_mean, ratio

few = settings(max_examples=15, deadline=None)
values = arrays(np.float64, st.integers(2, 40), elements=st.floats(-10, 10))


@few
@given(values)
def test_an_interval_is_that_of_the_mean_and_lies_among_the_values(found: np.ndarray) -> None:
    estimate = bootstrap_mean(found)
    assert estimate.value == pytest.approx(found.mean(), abs=1e-9)
    assert found.min() - 1e-9 <= estimate.low <= estimate.high <= found.max() + 1e-9
    assert bootstrap_mean(found) == estimate


@few
@given(values, st.floats(-5, 5), st.floats(0.1, 5))
def test_shifting_and_scaling_the_values_does_so_with_the_interval(
    found: np.ndarray, shift: float, scale: float
) -> None:
    estimate, moved = bootstrap_mean(found), bootstrap_mean(scale * found + shift)
    expected = [scale * v + shift for v in (estimate.value, estimate.low, estimate.high)]
    assert [moved.value, moved.low, moved.high] == pytest.approx(expected, abs=1e-7)


def test_the_interval_of_a_mean_is_the_normal_theorys_where_that_holds() -> None:
    found = np.random.default_rng(0).normal(3, 2, 400)
    estimate = bootstrap_mean(found)
    half = 1.96 * found.std() / 20
    assert [estimate.low, estimate.high] == pytest.approx([found.mean() - half, found.mean() + half], abs=0.02)


def test_it_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    found = [bootstrap_mean(rng.normal(size=50)) for _ in range(100)]
    assert 88 <= sum(estimate.low <= 0 <= estimate.high for estimate in found) <= 99


def test_images_are_drawn_with_all_that_is_in_them() -> None:
    """One image has a hundred pairs: counting pairs as independent would give a far narrower interval."""
    per_image = np.array([[100, 100], [0, 1], [0, 1], [0, 1]])
    estimate = bootstrap(per_image)
    assert estimate.value == pytest.approx(100 / 103)
    assert estimate.low == 0


def test_resamples_without_a_measure_are_passed_over() -> None:
    assert np.isnan(ratio(np.array([0.0, 0.0])))
    assert bootstrap([[0, 0], [1, 2]]) == Estimate(0.5, 0.5, 0.5)
    nothing = bootstrap([[0, 0]])
    assert np.isnan([nothing.value, nothing.low, nothing.high]).all()


def test_no_image_is_an_error() -> None:
    with pytest.raises(OlaError, match="no image was measured"):
        bootstrap_mean([])


def test_it_is_written_with_its_interval() -> None:
    assert str(Estimate(0.12345, 0.1, 0.2)) == "0.123 [0.100, 0.200]"
