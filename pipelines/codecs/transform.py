"""A transform codec learned per teacher, as image codecs are built: decorrelate, spend bits where the variance is.

    features − their mean at each place → DCT over the grid → principal axes over the width → levels → bit planes

Fitted to a sample of the teacher's features. Variances are modelled as frequency × axis: one for every coefficient
fits the sample better and everything else worse. Bits go to the coefficients by reverse water-filling in whole bits
(greedy is optimal, as every further bit gains less), levels are Lloyd's for the pooled coefficients with as many bits.
Every image has a float16 scale per frequency, so that one unlike the sample is not clipped, and takes equally many
bytes: `rate` bits per value, the scales included. Side information, once per teacher: all of `Transform`.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from olavlm.data.codec import Layout

#: Most bits of a coefficient.
MOST = 8
#: Share of a Gaussian's variance that stays as error after 0, 1, … bits with the best levels (Max 1960).
LEFT = (1.0, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 0.0006442, 0.0001635, 0.0000412)
#: Coefficients that levels are fitted to, at most, and rounds of doing so.
_POOLED, _ROUNDS = 100_000, 20
_TINY = 1e-12


@dataclass(frozen=True)
class Transform:
    """The fitted codec; a coder as `olavlm.data.codec.Coder`, for features of one grid and width.

    Attributes:
        mean: (tokens, width).
        axes: (width, width), the principal axes as columns.
        std: (tokens, width), of the coefficients; an outer product, so tokens + width numbers are all there is to it.
        bits: (tokens, width) uint8.
        levels: (2 + 4 + … + 2^MOST,), for unit variance: those of 1 bit, then of 2 bits, …
    """

    mean: Tensor
    axes: Tensor
    std: Tensor
    bits: Tensor
    levels: Tensor

    @classmethod
    def fit(cls, sample: Tensor, rate: float) -> "Transform":
        """Fit to features (n, tokens, width) of a few hundred images, for `rate` bits per value.

        Raises:
            ValueError: at this rate the scales leave no bits for the values.
        """
        tokens, width = sample.shape[1:]
        budget = math.floor(rate * tokens * width) - 16 * tokens
        if budget <= 0:
            raise ValueError(f"{rate:g} bits is too small for tokens of {width} values and a scale of 16 bits")
        x = sample.double()
        mean = x.mean(0)
        centred = (x - mean).flatten(0, 1)
        axes = torch.linalg.eigh(centred.T @ centred)[1].flip(-1).float()
        coefficients = _forward((x - mean).float(), axes)
        variance = coefficients.double().square().mean(0)
        modelled = variance.mean(1, keepdim=True) * variance.mean(0, keepdim=True) / variance.mean().clamp_min(_TINY)
        std = modelled.sqrt().clamp_min(_TINY).float()
        bits = allocate(std, budget)
        spread = coefficients / (_scales(coefficients, std)[..., None] * std)
        levels = [_lloyd(spread[:, bits == b], 2**b) for b in range(1, MOST + 1)]
        return cls(mean.float(), axes, std, bits, torch.cat(levels))

    @property
    def side_bytes(self) -> int:
        """What every reader needs, at two bytes per number (bits: one)."""
        numbers = self.mean.numel() + self.axes.numel() + sum(self.std.shape) + self.levels.numel()
        return 2 * numbers + self.bits.numel()

    def layout(self, tokens: int, width: int) -> Layout:
        """See `Coder`."""
        values = (math.ceil(int(self.bits.long().sum()) / 8),)
        return Layout(np.dtype("uint8"), values, np.dtype("<f2"), (tokens,))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Coder`."""
        order, lengths = self._planes()
        bits = self.bits.flatten()[order]
        coefficients = _forward(x - self.mean, self.axes)
        scales = _scales(coefficients, self.std).half()
        if not bool(torch.isfinite(scales).all()):
            raise ValueError(f"features up to {float(x.abs().max()):.4g} are too far from what the codec was fitted to")
        divisor = scales.float()[..., None] * self.std
        spread = (coefficients / torch.where(divisor > 0, divisor, torch.inf)).flatten(1)[:, order]
        codes = torch.zeros(spread.shape, dtype=torch.int64)
        for b in range(1, MOST + 1):
            levels = self._levels(b)
            codes[:, bits == b] = torch.searchsorted((levels[1:] + levels[:-1]) / 2, spread[:, bits == b].contiguous())
        planes = torch.cat([codes[:, :n] >> j & 1 for j, n in enumerate(lengths)], dim=1)
        planes = torch.nn.functional.pad(planes, (0, -planes.shape[1] % 8)).view(len(x), -1, 8)
        return (planes << torch.arange(8)).sum(-1).to(torch.uint8), scales

    def decode(self, values: Tensor, scales: Tensor | None) -> Tensor:
        """See `Coder`."""
        assert scales is not None
        order, lengths = self._planes()
        planes = (values[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)
        codes = torch.zeros(len(values), len(order), dtype=torch.int64)
        start = 0
        for j, n in enumerate(lengths):
            codes[:, :n] |= planes[:, start : start + n].long() << j
            start += n
        spread = torch.zeros(len(values), self.std.numel())
        spread[:, order] = self.levels[codes + (2 ** self.bits.flatten()[order].long() - 2)]
        coefficients = spread.view(-1, *self.std.shape) * self.std * scales.float()[..., None]
        return _backward(coefficients, self.axes) + self.mean

    def step(self, values: Tensor, scales: Tensor | None) -> Tensor:
        """See `Coder`; the widest gap between two levels of any of the image's coefficients."""
        assert scales is not None
        gaps = torch.stack([torch.zeros(()), *(self._levels(b).diff().max() for b in range(1, MOST + 1))])
        widest = (gaps[self.bits.long()] * self.std).amax(1)
        return (scales.float() * widest).amax(-1)[..., None, None]

    def _levels(self, bits: int) -> Tensor:
        return self.levels[2**bits - 2 : 2 ** (bits + 1) - 2]

    def _planes(self) -> tuple[Tensor, list[int]]:
        """Coefficients with any bits, those with most bits first; and how many of them each bit plane covers."""
        bits = self.bits.flatten()
        order = torch.argsort(bits, descending=True, stable=True)[: int((bits > 0).sum())]
        return order, [int((bits > j).sum()) for j in range(MOST)]


def allocate(std: Tensor, budget: int) -> Tensor:
    """Whole bits per coefficient, uint8 like `std`, that sum to `budget` and leave the least expected squared error."""
    left = torch.tensor(LEFT, dtype=torch.float64)
    gains = std.double().square().flatten()[:, None] * (left[:-1] - left[1:])  # of the 1st, 2nd, … bit: falling
    chosen = torch.zeros(gains.numel(), dtype=torch.uint8)
    chosen[gains.flatten().topk(min(budget, gains.numel())).indices] = 1
    return chosen.view(gains.shape).sum(1).to(torch.uint8).view(std.shape)


def _forward(x: Tensor, axes: Tensor) -> Tensor:
    """Features (n, tokens, width) → coefficients."""
    return _over_grid(x @ axes, _dct(math.isqrt(x.shape[1])))


def _backward(coefficients: Tensor, axes: Tensor) -> Tensor:
    return _over_grid(coefficients, _dct(math.isqrt(coefficients.shape[1])).T) @ axes.T


def _scales(coefficients: Tensor, std: Tensor) -> Tensor:
    """By how much an image's coefficients of each frequency are larger than the sample's, (n, tokens)."""
    return (coefficients.square().sum(-1) / std.square().sum(-1)).sqrt()


def _over_grid(x: Tensor, matrix: Tensor) -> Tensor:
    """The matrix along both sides of a square grid of tokens."""
    side = len(matrix)
    rows = matrix @ x.reshape(len(x), side, -1)
    return (matrix @ rows.view(len(x) * side, side, -1)).view(x.shape)


def _dct(side: int) -> Tensor:
    """Orthonormal DCT-II (side, side)."""
    k = torch.arange(side, dtype=torch.float64)
    matrix = torch.cos(math.pi / side * (k + 0.5) * k[:, None]) * math.sqrt(2 / side)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


def _lloyd(x: Tensor, count: int) -> Tensor:
    """The `count` levels with the least squared error for the values of x, rising (Lloyd 1957)."""
    values = x.flatten().double().sort().values
    if len(values) > _POOLED:
        values = values[torch.linspace(0, len(values) - 1, _POOLED).long()]
    if len(values) < count:
        values = torch.special.ndtri((torch.arange(16 * count, dtype=torch.float64) + 0.5) / (16 * count))
    levels = values[((torch.arange(count) + 0.5) / count * len(values)).long()]
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), values.cumsum(0)])
    for _ in range(_ROUNDS):
        ends = torch.searchsorted(values, (levels[1:] + levels[:-1]) / 2)
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), ends, torch.tensor([len(values)])])
        counts = ends.diff()
        levels = torch.where(counts > 0, (sums[ends[1:]] - sums[ends[:-1]]) / counts.clamp_min(1), levels)
    return levels.float()
