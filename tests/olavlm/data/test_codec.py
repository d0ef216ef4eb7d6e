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


grouped = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from([32, 64])),
    elements=st.floats(-60000, 60000, width=32, allow_subnormal=True),
)


@given(grouped)
def test_int4_is_at_most_half_a_scale_of_its_group_off(x: np.ndarray) -> None:
    values, scales, decoded = _round_trip(x, "int4")
    assert scales is not None
    assert (values.dtype, scales.dtype) == (np.uint8, np.float16)
    assert values.shape == (*x.shape[:2], x.shape[2] // 2)
    assert scales.shape == (*x.shape[:2], x.shape[2] // 32)
    off = np.abs(x.astype(np.float64) - decoded)
    assert (off <= scales.repeat(32, axis=-1).astype(np.float64) * 0.5001 + 1e-44).all()


@given(grouped)
def test_int4_scale_is_the_next_half_above_a_seventh_of_the_largest_value(x: np.ndarray) -> None:
    _, scales, _ = _round_trip(x, "int4")
    assert scales is not None
    wanted = np.abs(x).reshape(*x.shape[:2], -1, 32).max(-1) / np.float32(7)
    assert (scales.astype(np.float32) >= wanted).all()
    assert (np.nextafter(scales, np.float16(-1)).astype(np.float32) < wanted).all()


def test_int4_keeps_what_lies_on_its_levels_and_its_order() -> None:
    x = np.zeros((1, 2, 64), np.float32)
    x[0, 1, :32] = np.resize(np.arange(-7, 8), 32) * 0.25
    x[0, 1, 32:] = np.resize(np.arange(7, -8, -1), 32) * 2.0
    values, scales, decoded = _round_trip(x, "int4")
    assert scales is not None
    np.testing.assert_array_equal(decoded, x)
    assert scales.tolist() == [[[0.0, 0.0], [0.25, 2.0]]]
    assert values[0, 1, 0] == (-7 + 8) | (-6 + 8) << 4  # the first value in the lower half of the byte


@pytest.mark.parametrize("name", list(codec.CODERS))
@pytest.mark.parametrize("tokens", [1, 4])
def test_what_is_stored_is_laid_out_and_counted_as_stated(name: str, tokens: int) -> None:
    layout = codec.layout(tokens, 64, name)
    values, scales = codec.encode(np.random.default_rng(0).normal(size=(2, tokens, 64)), name)
    assert (values.dtype, values.shape[1:]) == (layout.dtype, layout.shape)
    stored = values.nbytes
    if layout.scales_dtype is None:
        assert scales is None
    else:
        assert scales is not None
        assert (scales.dtype, scales.shape[1:]) == (layout.scales_dtype, layout.scales_shape)
        stored += scales.nbytes
    assert stored == 2 * codec.encoded_bytes(tokens, 64, name)


@pytest.mark.parametrize("name", list(codec.CODERS))
def test_nearly_the_same_features_are_stored_within_a_step(name: str) -> None:
    """What `verify` allows: a value on the border of two levels may fall on either."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(64, 4, 64)).astype(np.float32)
    values, scales, decoded = _round_trip(x, name)
    step = codec.step(torch.from_numpy(values), None if scales is None else torch.from_numpy(scales), name).numpy()
    _, _, moved = _round_trip(x + 0.002 * step * rng.uniform(-1, 1, x.shape).astype(np.float32), name)
    assert (np.abs(moved - decoded) <= 1.01 * step).all()
    if name != "fp16":
        assert (np.abs(moved - decoded) > 0.9 * step).any()  # and some do
    _, _, other = _round_trip(x[::-1].copy(), name)
    assert (np.abs(other - decoded) > 1.01 * step).any()


@given(hnp.arrays(np.float32, (1, 2, 3), elements=st.floats(-60000, 60000, width=32)))
def test_fp16_is_rounding_to_half_precision(x: np.ndarray) -> None:
    values, scales, decoded = _round_trip(x, "fp16")
    assert scales is None
    assert values.dtype == np.float16
    np.testing.assert_array_equal(decoded, x.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["int8", "int4", "fp16"])
def test_features_that_are_not_finite_are_refused(bad: float, name: str) -> None:
    with pytest.raises(ValueError, match="not finite"):
        codec.encode(np.array([[[1.0, bad] * 16]], np.float32), name)


@pytest.mark.parametrize("name", ["int4", "fp16"])
def test_a_codec_refuses_what_it_cannot_hold(name: str) -> None:
    with pytest.raises(ValueError, match=f"exceed the range of codec {name}"):
        codec.encode(np.full((1, 1, 32), 1e6, np.float32), name)


@pytest.mark.parametrize(("name", "dtype"), [("int8", torch.int8), ("int4", torch.uint8)])
def test_codecs_with_scales_cannot_be_decoded_without(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"{name} needs scales"):
        codec.decode(torch.zeros(1, 16, dtype=dtype), None, name)
