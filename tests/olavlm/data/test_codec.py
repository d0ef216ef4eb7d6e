import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from olavlm.data import codec

features = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=3, max_dims=3, max_side=6),
    elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=True),
)


def _round_trip(x: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    values, scales = codec.encode(x, name)
    decoded = codec.decode(torch.from_numpy(values), None if scales is None else torch.from_numpy(scales), name)
    return values, scales, decoded.numpy()


@given(features)
def test_int8_is_at_most_half_a_scale_off(x: np.ndarray) -> None:
    values, scales, decoded = _round_trip(x, "int8")
    assert values.dtype == np.int8
    assert values.shape == x.shape
    assert scales is not None
    assert scales.shape == x.shape[:2]
    off = np.abs(x.astype(np.float64) - decoded)
    assert (off <= scales[..., None] * 0.5001 + 2e-36).all()


@given(features)
def test_int8_scale_is_the_largest_value_over_127(x: np.ndarray) -> None:
    _, scales, _ = _round_trip(x, "int8")
    assert scales is not None
    np.testing.assert_allclose(scales, np.abs(x).max(-1) / 127, rtol=1e-6, atol=2e-38)


def test_int8_keeps_zero_tokens_and_extremes_exact() -> None:
    x = np.zeros((1, 3, 4), np.float32)
    x[0, 1] = [1, -1, 0.5, 0]
    values, scales, decoded = _round_trip(x, "int8")
    assert scales is not None
    assert scales[0].tolist() == [0.0, pytest.approx(1 / 127), 0.0]
    assert values[0, 1].tolist() == [127, -127, 64, 0]
    assert not decoded[0, 0].any()


@given(hnp.arrays(np.float32, (1, 2, 3), elements=st.floats(-60000, 60000, width=32)))
def test_fp16_is_rounding_to_half_precision(x: np.ndarray) -> None:
    values, scales, decoded = _round_trip(x, "fp16")
    assert scales is None
    assert values.dtype == np.float16
    np.testing.assert_array_equal(decoded, x.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["int8", "fp16"])
def test_features_that_are_not_finite_are_refused(bad: float, name: str) -> None:
    with pytest.raises(ValueError, match="not finite"):
        codec.encode(np.array([[[1.0, bad]]], np.float32), name)


def test_fp16_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ValueError, match="exceed the range of codec fp16"):
        codec.encode(np.array([[[1e6]]], np.float32), "fp16")


def test_int8_cannot_be_decoded_without_scales() -> None:
    with pytest.raises(ValueError, match="needs scales"):
        codec.decode(torch.zeros(1, 1, dtype=torch.int8), None, "int8")
