"""The Fréchet distance between two sets of features; FID (arXiv 1706.08500) where these are Inception's."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from olavlm.errors import OlaError

Array = NDArray[Any]


def frechet_distance(features: Array, others: Array) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½) of the Gaussians fitted to (n, d) and (m, d) features.

    Covariances are unbiased, as in the published implementation. The trace of the root is taken from the eigenvalues of
    Σ₁^½ Σ₂ Σ₁^½, which has the same ones as Σ₁ Σ₂ and is symmetric: no imaginary part has to be dropped, and a set of
    fewer samples than dimensions, whose covariance is singular, is no special case.

    Raises:
        OlaError: fewer than two samples on one side, or features of another width.
    """
    if min(len(features), len(others)) < 2 or features.shape[1:] != others.shape[1:]:
        raise OlaError(
            f"Fréchet distance: features {features.shape} and {others.shape}; expected two samples or more on both "
            "sides, of one width"
        )
    (mean, covariance), (mean2, covariance2) = (_gaussian(of.astype(np.float64)) for of in (features, others))
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ covariance2 @ root), 0)).sum()
    return float(((mean - mean2) ** 2).sum() + np.trace(covariance) + np.trace(covariance2) - 2 * shared)


def _gaussian(features: Array) -> tuple[Array, Array]:
    """Mean (d,) and unbiased covariance (d, d)."""
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))
