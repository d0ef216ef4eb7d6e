"""The codecs the table compares: those of `olavlm.data.codec`, and candidates that are not among them (yet)."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numcodecs import Zstd
from torch import Tensor

from olavlm.data.codec import CODERS, Coder, Layout
from pipelines.codecs.transform import Transform

#: Images over which side information is spread in bytes per image: LLaVA's pretraining set.
IMAGES = 558_128


@dataclass(frozen=True)
class Candidate:
    """A codec in the table: `coder`, its values through zstd if so, and the side information every reader needs."""

    coder: Coder
    zstd: int | None = None  # level
    side_bytes: int = 0

    def encode(self, x: Tensor) -> list[bytes]:
        """What would be stored of each image; features (n, tokens, width) float32."""
        values, scales = self.coder.encode(x)
        rows = [row.tobytes() for row in values.numpy()]
        if self.zstd is not None:
            compressor = Zstd(self.zstd)
            rows = [compressor.encode(row) for row in rows]
        return rows if scales is None else [s.tobytes() + row for s, row in zip(scales.numpy(), rows, strict=True)]

    def decode(self, stored: list[bytes], tokens: int, width: int) -> Tensor:
        """The inverse of `encode`: features (n, tokens, width) float32."""
        layout = self.coder.layout(tokens, width)
        head = math.prod(layout.scales_shape) * layout.scales_dtype.itemsize if layout.scales_dtype else 0
        rows = [row[head:] for row in stored]
        if self.zstd is not None:
            compressor = Zstd(self.zstd)
            rows = [compressor.decode(row) for row in rows]
        values = _stack(rows, layout.dtype, layout.shape)
        if layout.scales_dtype is None:
            return self.coder.decode(values, None)
        return self.coder.decode(
            values, _stack([row[:head] for row in stored], layout.scales_dtype, layout.scales_shape)
        )


def _stack(rows: list[bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.frombuffer(b"".join(rows), dtype).reshape(len(rows), *shape).copy())


def candidates(sample: Tensor) -> dict[str, Candidate]:
    """By name, from the finest to the coarsest; learned ones are fitted to `sample` (n, tokens, width)."""
    fine, coarse = (Transform.fit(sample, rate) for rate in (1.5, 0.75))
    return {
        "fp16": Candidate(CODERS["fp16"]),
        "int8": Candidate(CODERS["int8"]),
        "int8+zstd": Candidate(CODERS["int8"], zstd=1),
        "int4": Candidate(CODERS["int4"]),
        "ternary": Candidate(Ternary(unbiased=False)),
        "ternary, unbiased": Candidate(Ternary(unbiased=True)),
        "transform 1.5": Candidate(fine, side_bytes=fine.side_bytes),
        "transform 0.75": Candidate(coarse, side_bytes=coarse.side_bytes),
    }


class Ternary:
    """Rotated 1.6-bit codec, nothing learned: random signs, Hadamard transform, three levels, five to a byte.

    After the rotation (Ailon & Chazelle 2006; for quantization: QuIP#, arXiv 2402.04396, and TurboQuant, 2504.19874)
    every value of a token is nearly Gaussian, for which thresholds ±0.612 σ are the best for three levels (Max 1960).
    One float16 scale per token. The best scale for the squared error shrinks: ⟨q, x⟩ < ⟨x, x⟩. `unbiased` gives the
    scale with ⟨q, x⟩ = ⟨x, x⟩ instead (RaBitQ, arXiv 2405.12497): more noise, but what is learned from many such
    targets is not pulled to zero.
    """

    THRESHOLD = 0.612
    POWERS = (1, 3, 9, 27, 81)

    def __init__(self, unbiased: bool):
        self.unbiased = unbiased

    def layout(self, tokens: int, width: int) -> Layout:
        """See `Coder`."""
        return Layout(np.dtype("uint8"), (tokens, -(-width // 5) + 1), np.dtype("<f2"), (tokens,))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Coder`."""
        rotated = _hadamard(x * _signs(x.shape[-1]))
        sigma = rotated.square().mean(-1, keepdim=True).sqrt()
        levels = (rotated > self.THRESHOLD * sigma).to(torch.uint8) + (rotated >= -self.THRESHOLD * sigma)
        signed = levels.float() - 1
        along = (signed * rotated).sum(-1)
        scales = rotated.square().sum(-1) / along if self.unbiased else along / signed.square().sum(-1)
        width = x.shape[-1]
        padded = torch.nn.functional.pad(levels, (0, -width % 5))
        packed = (padded.view(*levels.shape[:-1], -1, 5) * torch.tensor(self.POWERS, dtype=torch.uint8)).sum(-1)
        rest = torch.full_like(packed[..., :1], -width % 5)  # the last byte tells how much is padding
        return torch.cat([packed, rest], dim=-1).to(torch.uint8), scales.nan_to_num().half()

    def decode(self, values: Tensor, scales: Tensor | None) -> Tensor:
        """See `Coder`."""
        assert scales is not None
        width = (values.shape[-1] - 1) * 5 - int(values.flatten()[-1])
        trits = torch.stack([values[..., :-1] // power % 3 for power in self.POWERS], dim=-1).flatten(-2)[..., :width]
        return _hadamard((trits.float() - 1) * scales.float()[..., None]) * _signs(width)

    def step(self, values: Tensor, scales: Tensor | None) -> Tensor:
        """See `Coder`; a value that falls on the next level moves every value of its token by a part of the scale."""
        assert scales is not None
        return scales.float()[..., None]


def _signs(width: int) -> Tensor:
    bits = np.random.Generator(np.random.PCG64(width)).integers(0, 2, width)
    return torch.from_numpy(bits).float() * 2 - 1


def _hadamard(x: Tensor) -> Tensor:
    """Orthonormal Hadamard transform over blocks of the largest power of two that divides the width; self-inverse."""
    width = x.shape[-1]
    block = width & -width
    y, half = x.reshape(-1, block), 1
    while half < block:
        y = y.view(-1, block // (2 * half), 2, half)
        y = torch.stack([y[:, :, 0] + y[:, :, 1], y[:, :, 0] - y[:, :, 1]], dim=2).view(-1, block)
        half *= 2
    return (y / math.sqrt(block)).view(x.shape)
