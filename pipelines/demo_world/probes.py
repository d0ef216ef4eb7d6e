"""Linear probes: how much of something can be read from features by a linear map, on groups the map has not seen.

All are cross-fitted: the groups (scenes) are dealt into folds, and each fold is predicted by a map that was fitted, its
penalty included, on the others.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from olavlm.eval.maps import iou, overlaps

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

FOLDS = 4
#: Ridge penalties per row, on standardised features.
RIDGE = tuple(10.0**k for k in range(-6, 2))
#: Penalties of softmax regression, weighed against the mean cross-entropy.
SOFTMAX = (1e-4, 1e-3, 1e-2)


def ridge(x: Array, y: Array, groups: Labels) -> Array:
    """Cross-fitted predictions of ridge regression.

    Args:
        x: features (n, d), standardised here.
        y: (n, k).
        groups: which rows belong together (n,).

    Returns:
        (n, k), every row from a map fitted without its group.
    """
    predicted = np.empty_like(y)
    for rest, held_out in _folds(groups):
        errors = np.zeros(len(RIDGE))
        for inner, checked in _folds(groups[rest]):
            fitted = _ridge(x[rest][inner], y[rest][inner], x[rest][checked], RIDGE)
            errors += [((f - y[rest][checked]) ** 2).sum() for f in fitted]
        (predicted[held_out],) = _ridge(x[rest], y[rest], x[held_out], [RIDGE[int(errors.argmin())]])
    return predicted


def classify(
    x: Array,
    labels: Labels,
    classes: int,
    groups: Labels,
    penalties: Sequence[float] = SOFTMAX,
    folds: int = FOLDS,
) -> Labels:
    """Cross-fitted predictions of softmax regression.

    Args:
        x: features (n, d), standardised here.
        labels: (n, m): `m` labels per row, each in [0, classes), each with a linear map of its own.
        classes: how many.
        groups: which rows belong together (n,).
        penalties: to choose from, by one further split; where there are far more rows than features, one will do.
        folds: how many the groups are dealt into.

    Returns:
        (n, m) predicted labels.
    """
    predicted = np.empty_like(labels)
    for rest, held_out in _folds(groups, folds):
        inner, checked = next(_folds(groups[rest]))
        right = [0.0]
        if len(penalties) > 1:
            tried = (_softmax(x[rest][inner], labels[rest][inner], classes, x[rest][checked], p) for p in penalties)
            right = [float((found == labels[rest][checked]).mean()) for found in tried]
        best = penalties[int(np.argmax(right))]
        predicted[held_out] = _softmax(x[rest], labels[rest], classes, x[held_out], best)
    return predicted


def r2(y: Array, predicted: Array) -> float:
    """Share of variance explained, the mean over columns of (n, k)."""
    return float((1 - ((y - predicted) ** 2).sum(0) / ((y - y.mean(0)) ** 2).sum(0)).mean())


def miou(labels: Labels, predicted: Labels, classes: int) -> Array:
    """Intersection over union per class (classes,); NaN for a class that is in neither."""
    return iou(overlaps(predicted, labels, classes))


def _folds(groups: Labels, folds: int = FOLDS) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """(to fit on, to predict) as masks over the rows."""
    fold = np.unique(groups, return_inverse=True)[1] % folds
    for i in range(folds):
        yield fold != i, fold == i


def _standardise(x: Array, other: Array) -> tuple[Array, Array]:
    mean, std = x.mean(0), x.std(0)
    std = np.where(std > 1e-6 * (np.abs(mean) + 1e-6), std, 1.0)
    return (x - mean) / std, (other - mean) / std


def _ridge(x: Array, y: Array, new: Array, penalties: Sequence[float]) -> list[Array]:
    """Predictions for `new` under each penalty, from one eigendecomposition."""
    x, new = _standardise(x, new)
    centre = y.mean(0)
    values, vectors = np.linalg.eigh(x.T @ x)
    along, seen = vectors.T @ (x.T @ (y - centre)), new @ vectors
    return [centre + seen @ (along / (np.maximum(values, 0) + p * len(x))[:, None]) for p in penalties]


def _softmax(x: Array, labels: Labels, classes: int, new: Array, penalty: float) -> Labels:
    """Most probable labels of `new`; the fit is convex, by L-BFGS from zero."""
    seen, asked = (torch.from_numpy(a).float() for a in _standardise(x, new))
    wanted, several = torch.from_numpy(labels).flatten(), labels.shape[1]
    weight = torch.zeros(x.shape[1], several * classes, requires_grad=True)
    bias = torch.zeros(several * classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy((seen @ weight + bias).view(-1, classes), wanted) + penalty / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return np.asarray((asked @ weight + bias).view(-1, several, classes).argmax(-1).numpy())
