"""Intervals over images: the percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, ch. 13)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from olavlm.errors import OlaError

RESAMPLES = 2000
LEVEL = 0.95

Array = NDArray[Any]


@dataclass(frozen=True)
class Estimate:
    """A measured value, and the ends of its interval at `LEVEL`."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ratio(totals: Array) -> Array:
    """(…, 2) → (…): the first over the second, NaN where that is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(totals[..., 1] > 0, totals[..., 0] / totals[..., 1], np.nan))


def bootstrap(per_image: ArrayLike, measure: Callable[[Array], Array] = ratio) -> Estimate:
    """A measure that is a function of sums over images, and its interval over resampled images.

    An image is drawn with all that was measured in it, so that what belongs together (its pairs, its pixels) stays
    together. The resamples depend on the number of images alone: measures of the same images see the same resamples.

    Args:
        per_image: (n, *shape), what adds up over the images; for a mean (n, 2) of value and 1.
        measure: sums (…, *shape) → measures (…); NaN where there is none, as in a resample without any pair.

    Raises:
        OlaError: there is no image.
    """
    found = np.asarray(per_image, np.float64)
    n, shape = len(found), found.shape[1:]
    if not n:
        raise OlaError("bootstrap: no image was measured; expected one at least")
    flat = found.reshape(n, -1)
    rng = np.random.Generator(np.random.PCG64(0))
    totals = np.empty((RESAMPLES, flat.shape[1]))
    for total in totals:
        total[:] = np.bincount(rng.integers(n, size=n), minlength=n) @ flat
    value = float(measure(found.sum(0)))
    if np.isnan(value):
        return Estimate(value, value, value)
    low, high = np.nanquantile(measure(totals.reshape(-1, *shape)), [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return Estimate(value, low, high)


def bootstrap_mean(values: ArrayLike) -> Estimate:
    """The mean of one value per image (n,), with its interval; for two students, of their paired differences."""
    column = np.asarray(values, np.float64)
    return bootstrap(np.stack([column, np.ones_like(column)], axis=1))
