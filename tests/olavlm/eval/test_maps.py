"""Measures of maps: reading them at points, the order of depths, mIoU, relative error."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from olavlm.eval.maps import absolute_relative_error, depth_order, iou, mean_iou, overlaps, read_map

few = settings(max_examples=30, deadline=None)
labels = arrays(np.int64, (4, 6, 5), elements=st.integers(0, 3))  # of four images
depths = arrays(np.float64, 12, elements=st.floats(0.1, 10))


def test_a_map_is_read_at_its_pixels_centres_between_them_and_at_its_border() -> None:
    columns = torch.tensor([[1.0, 2.0, 4.0]]).expand(2, 3)
    at = np.array([[1 / 6, 0.25], [0.5, 0.5], [2 / 3, 0.5], [5.0, -3.0], [-1.0, 0.5]])
    assert read_map(columns, at) == pytest.approx([1, 2, 3, 4, 1])
    named = torch.tensor([[7, 8, 9]]).expand(2, 3)
    assert read_map(named, at[[0, 1, 3]]).tolist() == [7, 8, 9]


@few
@given(labels)
def test_labels_read_at_the_centres_of_all_pixels_are_the_map_itself(found: np.ndarray) -> None:
    height, width = found.shape[1:]
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    assert np.array_equal(read_map(torch.from_numpy(found[0]), np.stack([x, y], -1)), found[0])


@few
@given(depths, depths, st.booleans())
def test_the_true_depths_are_always_in_order_and_their_negatives_never(
    first: np.ndarray, second: np.ndarray, larger_is_closer: bool
) -> None:
    truth = first > second if larger_is_closer else first < second
    right, count = depth_order(first, second, truth, larger_is_closer)
    ties = (first == second).sum()
    assert right == count - ties / 2
    assert depth_order(-first, -second, truth, larger_is_closer)[0] == ties / 2
    assert depth_order(second, first, ~truth, larger_is_closer)[0] == count - ties / 2  # which is named first is free
    assert depth_order(first, second, truth, not larger_is_closer)[0] == ties / 2


def test_a_map_without_differences_is_right_in_half_of_the_pairs() -> None:
    same = np.ones(7)
    assert depth_order(same, same, np.arange(7) > 2, larger_is_closer=False).tolist() == [3.5, 7]


@few
@given(labels, labels)
def test_miou_is_that_of_the_confusion_matrix_of_all_images(predicted: np.ndarray, truth: np.ndarray) -> None:
    confusion = np.zeros((5, 5))
    for p, t in zip(predicted.ravel(), truth.ravel(), strict=True):
        confusion[t, p] += 1
    shares = [
        confusion[c, c] / union
        for c in range(5)
        if (union := confusion[c].sum() + confusion[:, c].sum() - confusion[c, c]) > 0
    ]
    totals = sum(overlaps(p, t, 5) for p, t in zip(predicted, truth, strict=True))
    assert mean_iou(np.asarray(totals)) == pytest.approx(np.mean(shares))
    assert np.isnan(iou(np.asarray(totals))[4])  # a class that is nowhere does not count


@few
@given(labels, labels, arrays(np.bool_, (4, 6, 5)))
def test_ignored_pixels_count_nowhere(predicted: np.ndarray, truth: np.ndarray, ignored: np.ndarray) -> None:
    marked = np.where(ignored, 255, truth)
    kept = overlaps(predicted[~ignored], truth[~ignored], 4)
    assert np.array_equal(overlaps(predicted, marked, 4, ignore=255), kept)


def test_a_class_that_is_only_predicted_costs() -> None:
    truth = np.zeros(4, np.int64)
    assert mean_iou(overlaps(np.array([0, 0, 0, 1]), truth, 3)) == pytest.approx((3 / 4 + 0) / 2)
    assert mean_iou(overlaps(truth, truth, 3)) == 1
    assert np.isnan(mean_iou(overlaps(truth, np.full(4, 255), 3, ignore=255)))


def test_the_relative_error_is_over_what_is_known() -> None:
    predicted, truth = np.array([[1.0, 3.0], [9.0, 2.0]]), np.array([[2.0, 2.0], [0.0, 2.0]])
    assert absolute_relative_error(predicted, truth).tolist() == pytest.approx([1 / 3, 1])
    assert absolute_relative_error(predicted, 0 * truth).tolist() == [0, 0]
