"""Features and decoded maps as pictures: pure functions, and one scale for all that is to be compared."""

import colorsys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Picture = np.ndarray[Any, Any]  # (height, width, 3) uint8

#: Anchors of the depth colour map, far to near (matplotlib's magma at 0, 1/4, 1/2, 3/4, 1).
_MAGMA = np.array([[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]], np.float64)


@dataclass(frozen=True)
class Scale:
    """The values that a map's colours stand for, dark to bright; whatever lies beyond takes the colour of the end.

    ``dark > bright`` where larger is farther: what is near is always bright.
    """

    dark: float
    bright: float

    @classmethod
    def of(cls, values: Tensor, larger_is_darker: bool = False) -> "Scale":
        """The 2nd to 98th percentile of a float map of any shape."""
        low, high = values.float().flatten().quantile(torch.tensor([0.02, 0.98], device=values.device)).tolist()
        return cls(high, low) if larger_is_darker else cls(low, high)

    def draw(self, values: Tensor) -> Picture:
        """A float map (H, W) in colours."""
        levels, anchors = self._levels(values).numpy(), np.linspace(0, 1, len(_MAGMA))
        colours = np.stack([np.interp(levels, anchors, _MAGMA[:, channel]) for channel in range(3)], -1)
        return colours.round().astype(np.uint8)

    def distance(self, one: Tensor, other: Tensor) -> float:
        """How far apart two maps are on average, as a share of the scale: 0 to 1."""
        return float((self._levels(one) - self._levels(other)).abs().mean())

    def bar(self) -> Picture:
        """All its colours, dark to bright: (1, 128, 3)."""
        return self.draw(torch.linspace(self.dark, self.bright, 128, dtype=torch.float64)[None])

    def _levels(self, values: Tensor) -> Tensor:
        return ((values.double().cpu() - self.dark) / ((self.bright - self.dark) or 1.0)).clamp(0, 1)


def draw_labels(labels: Tensor) -> Picture:
    """A map of labels (H, W) int64 in colours, as `label_colour` has them."""
    found, where = np.unique(labels.cpu().numpy(), return_inverse=True)
    palette = np.array([label_colour(int(label)) for label in found], np.uint8)
    return palette[where.reshape(labels.shape)]


def label_colour(label: int) -> tuple[int, int, int]:
    """The RGB of a label, the same in every picture: hues a golden angle apart, in changing strength and brightness."""
    hue = (0.58 + label * 0.618034) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.45, 0.75, 0.6)[label % 3], (0.93, 0.8, 0.55, 0.7, 0.85)[label % 5])
    return round(255 * red), round(255 * green), round(255 * blue)


@dataclass(frozen=True)
class Components:
    """The three directions of largest variance over some tokens, as red, green and blue."""

    mean: Tensor  # (width,)
    directions: Tensor  # (width, 3)
    low: Tensor  # (3,), the 2nd percentile of the tokens' coordinates; no colour there
    high: Tensor  # (3,), the 98th; full colour there

    @classmethod
    def of(cls, features: Tensor) -> "Components":
        """Fitted on all tokens of features (n, tokens, width); the same features give the same signs everywhere."""
        tokens = features.flatten(0, 1).double().cpu()
        mean = tokens.mean(0)
        centred = tokens - mean
        directions = torch.linalg.eigh(centred.T @ centred)[1][:, -3:].flip(1)
        largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
        directions = directions * largest.sign()
        low, high = (centred @ directions).quantile(torch.tensor([0.02, 0.98], dtype=torch.float64), dim=0)
        return cls(mean, directions, low, high)

    def draw(self, features: Tensor, grid: int) -> Picture:
        """One image's features (grid², width), row-major, as colours (grid, grid, 3)."""
        projected = (features.double().cpu() - self.mean) @ self.directions
        levels = ((projected - self.low) / (self.high - self.low).clamp_min(1e-12)).clamp(0, 1) * 255
        return levels.round().to(torch.uint8).reshape(grid, grid, 3).numpy()
