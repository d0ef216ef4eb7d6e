"""How target features become bytes and features again. The codec's name is part of a target's identity.

``int8``: symmetric, one scale per token: ``q = round(x / s)`` in [-127, 127] with ``s = max|x| / 127``.
``fp16``: IEEE half precision.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from olavlm.config import Codec

#: Below this a token's scale would be subnormal and inexact; such a token (never seen in a real feature) becomes zero.
_SMALLEST = 127 * float(np.finfo(np.float32).tiny)
#: Bytes of one value, and whether the codec keeps a float32 scale per token.
DTYPES: dict[str, np.dtype[Any]] = {"int8": np.dtype("int8"), "fp16": np.dtype("<f2")}
HAS_SCALES: dict[str, bool] = {"int8": True, "fp16": False}


def encode(
    features: Tensor | np.ndarray[Any, Any], codec: Codec
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    """Quantize features.

    Args:
        features: (n, tokens, width) float32, on any device; the arithmetic runs there.
        codec: ``int8`` or ``fp16``.

    Returns:
        values (n, tokens, width) int8 or float16, and scales (n, tokens) float32, or None for fp16.
        int8: ``|x - decode(...)| <= scale / 2`` elementwise.

    Raises:
        ValueError: not finite, or beyond what float16 holds.
    """
    x = torch.as_tensor(features, dtype=torch.float32)
    if not bool(torch.isfinite(x).all()):
        raise ValueError("features are not finite")
    if codec == "fp16":
        half = x.to(torch.float16)
        if not bool(torch.isfinite(half).all()):
            raise ValueError(f"features up to {float(x.abs().max()):.4g} exceed the range of codec fp16")
        return half.cpu().numpy(), None
    largest = x.abs().amax(-1)
    scales = torch.where(largest < _SMALLEST, torch.zeros_like(largest), largest / 127)
    divisor = torch.where(scales > 0, scales, torch.full_like(scales, torch.inf))
    values = torch.round(x / divisor[..., None]).clamp_(-127, 127).to(torch.int8)
    return values.cpu().numpy(), scales.cpu().numpy()


def decode(values: Tensor, scales: Tensor | None, codec: Codec) -> Tensor:
    """Features (…, tokens, width) float32 from `values` and `scales` (…, tokens), on the device they are on.

    Raises:
        ValueError: scales are missing where the codec needs them.
    """
    if not HAS_SCALES[codec]:
        return values.float()
    if scales is None:
        raise ValueError(f"codec {codec} needs scales")
    return values.float() * scales.float()[..., None]


def encoded_bytes(tokens: int, width: int, codec: Codec) -> int:
    """Stored bytes of one image's target: the values, and the scales of codecs that have them."""
    return tokens * width * DTYPES[codec].itemsize + (4 * tokens if HAS_SCALES[codec] else 0)
