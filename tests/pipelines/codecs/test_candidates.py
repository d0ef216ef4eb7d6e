import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from olavlm.data.codec import CODERS
from pipelines.codecs import transform
from pipelines.codecs.candidates import Candidate, Ternary, candidates
from pipelines.codecs.transform import MOST, Transform, allocate

TOKENS, WIDTH = 16, 32


def _features(n: int, seed: int) -> Tensor:
    """Like a teacher's: a mean, few strong directions, neighbours alike."""
    rng = np.random.default_rng(0)
    mean, directions = rng.normal(size=WIDTH), rng.normal(size=(WIDTH, WIDTH)) * 0.7 ** np.arange(WIDTH)[:, None]
    grid = np.random.default_rng(seed).normal(size=(n, 4, 4, WIDTH)).cumsum(1).cumsum(2)
    return torch.tensor(grid.reshape(n, TOKENS, WIDTH) @ directions + mean, dtype=torch.float32)


@pytest.fixture(scope="module")
def fitted() -> dict[str, Candidate]:
    return candidates(_features(256, seed=1))


def _error(candidate: Candidate, x: Tensor) -> float:
    return float((candidate.decode(candidate.encode(x), *x.shape[1:]) - x).norm() / x.norm())


def test_every_codec_stores_what_its_layout_says_and_reads_it_back(fitted: dict[str, Candidate]) -> None:
    x = _features(3, seed=2)
    for candidate in fitted.values():
        stored = candidate.encode(x)
        assert len(stored) == 3
        assert candidate.decode(stored, TOKENS, WIDTH).shape == x.shape
        if candidate.zstd is None:
            assert {len(row) for row in stored} == {candidate.coder.layout(TOKENS, WIDTH).bytes}


def test_an_image_is_stored_the_same_alone_and_among_others(fitted: dict[str, Candidate]) -> None:
    x = _features(5, seed=3)
    for candidate in fitted.values():
        together = candidate.decode(candidate.encode(x), TOKENS, WIDTH)
        alone = candidate.decode(candidate.encode(x[2:3]), TOKENS, WIDTH)
        torch.testing.assert_close(alone[0], together[2], rtol=1e-4, atol=1e-4)


def test_fewer_bits_are_coarser_and_a_learned_transform_beats_int4_at_a_third_of_its_bytes(
    fitted: dict[str, Candidate],
) -> None:
    x = _features(64, seed=4)
    errors = {name: _error(candidate, x) for name, candidate in fitted.items()}
    assert errors["fp16"] < errors["int8"] < errors["transform 1.5"] < errors["int4"] < errors["ternary"]
    assert errors["transform 1.5"] < errors["transform 0.75"]
    assert errors["ternary"] < errors["ternary, unbiased"]
    layouts = {name: fitted[name].coder.layout(TOKENS, WIDTH).bytes for name in ("int4", "transform 1.5")}
    assert 3 * layouts["transform 1.5"] <= 1.1 * layouts["int4"]


def test_zstd_loses_nothing(fitted: dict[str, Candidate]) -> None:
    x = _features(4, seed=5)
    plain, packed = (fitted[n].decode(fitted[n].encode(x), TOKENS, WIDTH) for n in ("int8", "int8+zstd"))
    assert torch.equal(plain, packed)
    constant = torch.ones(1, 64, 64)
    assert len(Candidate(CODERS["int8"], zstd=1).encode(constant)[0]) < 0.1 * 64 * 64


tokens = hnp.arrays(
    np.float32, st.tuples(st.just(2), st.just(3), st.integers(1, 24)), elements=st.floats(-8, 8, width=16)
)


@given(tokens)
def test_ternary_keeps_length_along_the_token_when_unbiased_and_is_closest_when_not(x: np.ndarray) -> None:
    features = torch.from_numpy(x)
    for unbiased in (True, False):
        candidate = Candidate(Ternary(unbiased))
        decoded = candidate.decode(candidate.encode(features), *x.shape[1:])
        along, kept = (decoded * features).sum(-1), features if unbiased else decoded
        torch.testing.assert_close(along, kept.square().sum(-1), rtol=3e-3, atol=1e-3)


@given(hnp.arrays(np.float32, (3, 4), elements=st.floats(0, 100, width=32)), st.integers(0, 3 * 4 * MOST))
def test_bits_sum_to_the_budget_and_no_bit_would_gain_more_elsewhere(std: np.ndarray, budget: int) -> None:
    bits = allocate(torch.from_numpy(std), budget)
    assert int(bits.long().sum()) == budget
    assert int(bits.max()) <= MOST
    left = np.array([*transform.LEFT, np.nan])
    variance, b = std.astype(np.float64) ** 2, bits.long().numpy()
    gained = np.where(b > 0, variance * (left[np.maximum(b - 1, 0)] - left[b]), np.inf)
    possible = np.where(b < MOST, variance * (left[b] - left[b + 1]), -np.inf)
    assert gained.min() >= possible.max() - 1e-9


def test_the_transform_takes_exactly_its_rate_and_its_sample_is_read_back_nearly_as_well_as_others() -> None:
    sample, other = _features(256, seed=6), _features(64, seed=7)
    for rate in (0.75, 1.5, 3.0):
        candidate = Candidate(Transform.fit(sample, rate))
        assert candidate.coder.layout(TOKENS, WIDTH).bytes == TOKENS * WIDTH * rate / 8
        assert _error(candidate, other) < 1.3 * _error(candidate, sample)


def test_side_information_is_counted() -> None:
    fitted = Transform.fit(_features(64, seed=8), 1.5)
    numbers = TOKENS * WIDTH + TOKENS + WIDTH + WIDTH * WIDTH + sum(2**b for b in range(1, MOST + 1))
    assert fitted.side_bytes == 2 * numbers + TOKENS * WIDTH


def test_an_image_unlike_the_sample_is_not_clipped() -> None:
    candidate = Candidate(Transform.fit(_features(256, seed=9), 1.5))
    other = _features(16, seed=10)
    assert _error(candidate, 10 * (other - other.mean(0))) < 3 * _error(candidate, other)


def test_the_transform_refuses_what_it_cannot_hold_and_rates_that_leave_no_bits() -> None:
    with pytest.raises(ValueError, match=r"0\.5 bits is too small for tokens of 32 values"):
        Transform.fit(_features(8, seed=11), 0.5)
    with pytest.raises(ValueError, match="too far from what the codec was fitted to"):
        Transform.fit(_features(8, seed=11), 1.5).encode(torch.full((1, TOKENS, WIDTH), 1e12))


def test_what_is_nearly_the_same_is_stored_within_a_step() -> None:
    fitted = Transform.fit(_features(64, seed=12), 1.5)
    x = _features(16, seed=13)
    first, moved = (fitted.encode(y) for y in (x, x * (1 + 1e-6)))
    off = (fitted.decode(*first) - fitted.decode(*moved)).abs()
    assert (off <= 1.01 * fitted.step(*first)).all()
