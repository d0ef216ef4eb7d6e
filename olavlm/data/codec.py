"""How target features become bytes and features again. The codec's name is part of a target's identity.

``int8``: symmetric, one scale per token: ``q = round(x / s)`` in [-127, 127] with ``s = max|x| / 127``.
``int4``: symmetric, one float16 scale per group of 32 values of a token, ``q`` in [-7, 7], two to a byte.
``fp16``: IEEE half precision.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from olavlm.config import INT4_GROUP, Codec

#: Below this a token's scale would be subnormal and inexact; such a token (never seen in a real feature) becomes zero.
_SMALLEST = 127 * float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Layout:
    """What is stored of one image: dtype and shape of its values, and of its scales where the codec has them."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    scales_dtype: np.dtype[Any] | None = None
    scales_shape: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        """Of values and scales."""
        size = math.prod(self.shape) * self.dtype.itemsize
        return size + (math.prod(self.scales_shape) * self.scales_dtype.itemsize if self.scales_dtype else 0)


class Coder(Protocol):
    """A codec at work. Tensors are on any device, and stay there."""

    def layout(self, tokens: int, width: int) -> Layout:
        """What it stores of an image's (tokens, width) features."""
        ...

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values and scales (n, *layout) of finite features (n, tokens, width) float32; ValueError: out of range."""
        ...

    def decode(self, values: Tensor, scales: Tensor | None) -> Tensor:
        """Features (…, tokens, width) float32 of values and scales (…, *layout)."""
        ...

    def step(self, values: Tensor, scales: Tensor | None) -> Tensor:
        """By how much a decoded value may change when it falls on the next level; broadcasts against the features."""
        ...


class _Fp16:
    def layout(self, tokens: int, width: int) -> Layout:
        return Layout(np.dtype("<f2"), (tokens, width))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        half = x.to(torch.float16)
        if not bool(torch.isfinite(half).all()):
            raise ValueError(f"features up to {float(x.abs().max()):.4g} exceed the range of codec fp16")
        return half, None

    def decode(self, values: Tensor, scales: Tensor | None) -> Tensor:
        return values.float()

    def step(self, values: Tensor, scales: Tensor | None) -> Tensor:
        return values.float().abs().amax() * 2**-10


class _Int8:
    def layout(self, tokens: int, width: int) -> Layout:
        return Layout(np.dtype("int8"), (tokens, width), np.dtype("<f4"), (tokens,))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        largest = x.abs().amax(-1)
        scales = torch.where(largest < _SMALLEST, torch.zeros_like(largest), largest / 127)
        divisor = torch.where(scales > 0, scales, torch.full_like(scales, torch.inf))
        return torch.round(x / divisor[..., None]).clamp_(-127, 127).to(torch.int8), scales

    def decode(self, values: Tensor, scales: Tensor | None) -> Tensor:
        return values.float() * _needed(scales, "int8").float()[..., None]

    def step(self, values: Tensor, scales: Tensor | None) -> Tensor:
        return _needed(scales, "int8").float()[..., None]


class _Int4:
    def layout(self, tokens: int, width: int) -> Layout:
        return Layout(np.dtype("uint8"), (tokens, width // 2), np.dtype("<f2"), (tokens, width // INT4_GROUP))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        groups = x.view(*x.shape[:-1], -1, INT4_GROUP)
        exact = groups.abs().amax(-1) / 7
        scales = exact.half()
        # Rounded up, to the next half where need be: then no value lies beyond the last level.
        scales = (scales.view(torch.int16) + (scales.float() < exact)).to(torch.int16).view(torch.float16)
        if not bool(torch.isfinite(scales).all()):
            raise ValueError(f"features up to {float(x.abs().max()):.4g} exceed the range of codec int4")
        divisor = torch.where(scales > 0, scales.float(), torch.full_like(exact, torch.inf))
        levels = (torch.round(groups / divisor[..., None]) + 8).to(torch.uint8).flatten(-2)  # 1 … 15
        return levels[..., ::2] | levels[..., 1::2] << 4, scales

    def decode(self, values: Tensor, scales: Tensor | None) -> Tensor:
        scales = _needed(scales, "int4").float().repeat_interleave(INT4_GROUP, dim=-1)
        return (torch.stack([values & 15, values >> 4], dim=-1).flatten(-2).float() - 8) * scales

    def step(self, values: Tensor, scales: Tensor | None) -> Tensor:
        return _needed(scales, "int4").float().repeat_interleave(INT4_GROUP, dim=-1)


def _needed(scales: Tensor | None, name: str) -> Tensor:
    if scales is None:
        raise ValueError(f"codec {name} needs scales")
    return scales


CODERS: dict[Codec, Coder] = {"int8": _Int8(), "int4": _Int4(), "fp16": _Fp16()}


def encode(
    features: Tensor | np.ndarray[Any, Any], codec: Codec
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    """Quantize features.

    Args:
        features: (n, tokens, width) float32, on any device; the arithmetic runs there.
        codec: ``int8``, ``int4`` or ``fp16``.

    Returns:
        values and scales (n, …) as `layout` says for each image; scales are None for fp16.
        int8, int4: ``|x - decode(...)| <= scale / 2`` elementwise.

    Raises:
        ValueError: not finite, or beyond what the codec can hold.
    """
    x = torch.as_tensor(features, dtype=torch.float32)
    if not bool(torch.isfinite(x).all()):
        raise ValueError("features are not finite")
    values, scales = CODERS[codec].encode(x)
    return values.cpu().numpy(), None if scales is None else scales.cpu().numpy()


def decode(values: Tensor, scales: Tensor | None, codec: Codec) -> Tensor:
    """Features (…, tokens, width) float32 from `values` and `scales`, on the device they are on.

    Raises:
        ValueError: scales are missing where the codec needs them.
    """
    return CODERS[codec].decode(values, scales)


def step(values: Tensor, scales: Tensor | None, codec: Codec) -> Tensor:
    """One quantization step (fp16: one unit in the last place of the largest value); broadcasts against `decode`'s."""
    return CODERS[codec].step(values, scales)


def layout(tokens: int, width: int, codec: Codec) -> Layout:
    """Dtypes and shapes of what is stored of one image."""
    return CODERS[codec].layout(tokens, width)


def encoded_bytes(tokens: int, width: int, codec: Codec) -> int:
    """Stored bytes of one image's target: the values, and the scales of codecs that have them."""
    return layout(tokens, width, codec).bytes
