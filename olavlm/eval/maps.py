"""Maps of depth and of labels, judged against the truth: what one image adds to a measure, as pure functions.

A map shows what its network's view shows, in any resolution. The truth is in pixels of the image: the map is read at
every point of the truth. A point that the view cuts off takes the nearest value that is seen; nothing is left out.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


def read_map(decoded: Tensor, positions: Array) -> Array:
    """The values of a map at some positions: depths bilinear between pixel centres, labels of the nearest pixel.

    Args:
        decoded: (H, W), depths of any floating dtype, or labels int64.
        positions: (…, 2) x and y as shares of the map's width and height, as `olavlm.data.images.view_positions` gives.

    Returns:
        (…) float64 or int64.
    """
    smooth = decoded.dtype.is_floating_point
    where = torch.from_numpy(2 * positions.reshape(1, 1, -1, 2) - 1)
    values = F.grid_sample(
        decoded.double().cpu()[None, None],
        where,
        mode="bilinear" if smooth else "nearest",
        padding_mode="border",
        align_corners=False,
    )
    found = values.numpy().reshape(positions.shape[:-1])
    return found if smooth else found.astype(np.int64)


def depth_order(first: Array, second: Array, first_is_closer: Array, larger_is_closer: bool) -> Array:
    """How many pairs of points have their depths in the right order, and how many there are: (2,).

    Equal depths count half, as a guess would. The sum of the first over that of the second is the accuracy that
    DA-2K reports (arXiv 2406.09414).

    Args:
        first: (p,) depths of the pairs' first points.
        second: (p,) of their second points.
        first_is_closer: (p,) bool, the truth.
        larger_is_closer: what a larger depth means.
    """
    towards = np.sign(first - second) * (1 if larger_is_closer else -1) * np.where(first_is_closer, 1, -1)
    return np.array([((towards + 1) / 2).sum(), len(first)])


def overlaps(predicted: Array, truth: Array, classes: int, ignore: int | None = None) -> Array:
    """Pixels in the intersection and in the union of prediction and truth, for every class: (2, classes).

    Summed over all images before `mean_iou` takes the ratio: that is how mIoU is defined (PASCAL VOC, arXiv 1405.0312).

    Args:
        predicted: labels in [0, classes), any shape.
        truth: the same shape.
        classes: how many there are.
        ignore: pixels with this label in the truth count in neither.
    """
    counted = truth != ignore if ignore is not None else np.ones(truth.shape, bool)
    predicted, truth = predicted[counted], truth[counted]
    both = np.bincount(truth[predicted == truth], minlength=classes)
    return np.stack([both, np.bincount(predicted, minlength=classes) + np.bincount(truth, minlength=classes) - both])


def iou(totals: Array) -> Array:
    """Intersection over union per class, (…, 2, classes) → (…, classes); NaN for a class that is in neither."""
    with np.errstate(invalid="ignore"):
        return np.asarray(totals[..., 0, :] / totals[..., 1, :])


def mean_iou(totals: Array) -> Array:
    """mIoU, (…, 2, classes) → (…): the mean over the classes that prediction or truth has; NaN where there are none."""
    there = (totals[..., 1, :] > 0).sum(-1)
    shares = np.nan_to_num(iou(totals)).sum(-1)
    return np.asarray(np.where(there > 0, shares / np.maximum(there, 1), np.nan))


def absolute_relative_error(predicted: Array, truth: Array) -> Array:
    """AbsRel of an image, the mean of |prediction − truth| / truth where the truth is known (> 0), and 1: (2,).

    Its mean over images is what is reported (Eigen et al., arXiv 1406.2283); an image without known depth adds (0, 0).
    """
    known = truth > 0
    if not known.any():
        return np.zeros(2)
    return np.array([(np.abs(predicted[known] - truth[known]) / truth[known]).mean(), 1.0])
