"""The Fréchet distance against what is known in closed form."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olavlm.errors import OlaError
from olavlm.eval.frechet import frechet_distance

few = settings(max_examples=20, deadline=None)


@few
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 30), width=st.integers(1, 8))
def test_a_set_is_at_no_distance_from_itself_and_a_shift_costs_its_square(seed: int, n: int, width: int) -> None:
    """Also with fewer samples than dimensions, where covariances are singular."""
    rng = np.random.default_rng(seed)
    features, shift = rng.normal(size=(n, width)), rng.normal(size=width)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(features, features[::-1] + shift) == pytest.approx((shift**2).sum(), abs=1e-5)


@few
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(0.1, 5))
def test_scaling_costs_the_square_of_each_deviations_change(seed: int, scale: float) -> None:
    """Gaussians with Σ and s² Σ, whose roots commute: tr(Σ + s²Σ − 2 sΣ) = (1 − s)² tr Σ."""
    features = np.random.default_rng(seed).normal(size=(50, 6))
    features -= features.mean(0)
    expected = (1 - scale) ** 2 * np.trace(np.cov(features, rowvar=False))
    assert frechet_distance(features, scale * features) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@few
@given(seed=st.integers(0, 2**32 - 1))
def test_it_is_symmetric_and_does_not_depend_on_the_axes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = rng.normal(size=(30, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(40, 5))
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    distance = frechet_distance(one, other)
    assert frechet_distance(other, one) == pytest.approx(distance, rel=1e-6)
    assert frechet_distance(one @ turn, other @ turn) == pytest.approx(distance, rel=1e-6)


def test_the_trace_of_the_root_is_that_of_the_matrix_root() -> None:
    """Against scipy's square root of the product, the published implementation."""
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(60, 4)) @ rng.normal(size=(4, 4)), rng.normal(size=(60, 4)) @ rng.normal(size=(4, 4))
    first, second = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    expected = ((one.mean(0) - other.mean(0)) ** 2).sum()
    expected += np.trace(first + second - 2 * linalg.sqrtm(first @ second).real)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shapes", [((1, 3), (5, 3)), ((5, 3), (5, 4))])
def test_what_has_no_covariance_or_other_width_is_refused(shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    with pytest.raises(OlaError, match="two samples or more"):
        frechet_distance(np.zeros(shapes[0]), np.zeros(shapes[1]))
