"""Probes find what was planted, and nothing where nothing is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.demo_world.features import Objects
from pipelines.demo_world.gates import as_asked, counted, ordinal
from pipelines.demo_world.probes import classify, miou, r2, ridge
from pipelines.demo_world.samples import render_samples

SCENES, EACH, WIDTH = 120, 4, 24


def _features(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Features of wildly different scales and offsets (n, d), and groups (n,)."""
    x = rng.standard_normal((SCENES * EACH, WIDTH)) * 10.0 ** rng.uniform(-3, 3, WIDTH) + rng.uniform(-5, 5, WIDTH)
    return x, np.repeat(np.arange(SCENES), EACH)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_ridge_finds_what_is_planted_and_nothing_in_noise(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, groups = _features(rng)
    planted = ((x - x.mean(0)) / x.std(0)) @ rng.standard_normal((WIDTH, 2))
    noisy = planted + 0.3 * planted.std(0) * rng.standard_normal(planted.shape)
    assert r2(planted, ridge(x, planted, groups)) > 0.999
    assert r2(noisy, ridge(x, noisy, groups)) == pytest.approx(1 / 1.09, abs=0.05)
    noise = rng.standard_normal((len(x), 2))
    assert abs(r2(noise, ridge(x, noise, groups))) < 0.05


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_softmax_finds_what_is_planted_and_nothing_in_noise(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, groups = _features(rng)
    logits = ((x - x.mean(0)) / x.std(0)) @ rng.standard_normal((WIDTH, 2 * 4))
    labels = logits.reshape(-1, 2, 4).argmax(-1)
    assert (classify(x, labels, 4, groups) == labels).mean() > 0.85
    noise = rng.integers(0, 4, labels.shape)
    assert (classify(x, noise, 4, groups) == noise).mean() < 0.34


def test_what_all_rows_of_a_group_share_is_not_learned_by_heart() -> None:
    """One-hot groups say everything about rows of groups that were seen, and nothing about others."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 10)
    y = rng.standard_normal((40, 1))[groups]
    assert r2(y, ridge(np.eye(40)[groups], y, groups)) < 0.05
    labels = rng.integers(0, 2, (40, 1))[groups]
    assert (classify(np.eye(40)[groups], labels, 2, groups) == labels).mean() < 0.7


def test_a_feature_that_never_changes_does_no_harm() -> None:
    rng = np.random.default_rng(0)
    x, groups = _features(rng)
    x[:, 0] = 3.0
    y = x[:, 1:2] / x[:, 1].std()
    assert r2(y, ridge(x, y, groups)) > 0.999


def test_iou_by_hand() -> None:
    found = miou(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]), 3)
    np.testing.assert_allclose(found, [1 / 2, 2 / 3, np.nan])


def test_balanced_order_gives_cues_no_credit() -> None:
    """Who goes by height in the image alone is right half of the time, however often that works."""
    rng = np.random.default_rng(0)
    scene = np.repeat(np.arange(800), 3)
    log_depth = rng.uniform(0, 2, len(scene))
    foot = 1 - log_depth / 2 + rng.uniform(-0.3, 0.3, len(scene))  # nearer is lower, mostly
    side = rng.uniform(0.1, 0.2, len(scene))
    boxes = np.stack([0 * foot, foot - side, side, foot], axis=1)
    balanced, every = ordinal(log_depth, -foot, scene, boxes)
    assert balanced == pytest.approx(0.5)
    assert every > 0.8
    assert ordinal(log_depth, log_depth, scene, boxes) == (1.0, 1.0)
    assert ordinal(log_depth, -log_depth, scene, boxes) == (0.0, 0.0)


def test_counts_by_hand() -> None:
    """Three scenes, one of them with no object; every number of a shape weighs alike."""
    shape, scene = np.array([0, 0, 1, 0, 3]), np.array([0, 0, 0, 2, 2])
    assert counted(shape, shape, scene) == 1
    wrong = np.array([0, 2, 1, 0, 3])  # one of two taken for a third shape
    # Shape 0: once right, twice wrong; 1: never and once right; 2: never half right; 3: never and once right.
    assert counted(shape, wrong, scene) == pytest.approx(np.mean([1, 0, 1, 1, 0.5, 1, 1]))


def test_pairs_as_asked_are_not_told_apart_by_their_boxes() -> None:
    """Neither by which one is lower nor by which one looks bigger; and the nearer one is nearer."""
    objects = Objects.of(render_samples("gates", 200, workers=1))
    near, far = as_asked(objects)
    assert len(near) > 60
    assert len({frozenset(pair) for pair in zip(near.tolist(), far.tolist(), strict=True)}) == len(near)
    assert (objects.scene[near] == objects.scene[far]).all()
    assert (objects.log_depth[near] < objects.log_depth[far]).all()
    for cue in (objects.boxes[:, 3], np.prod(objects.boxes[:, 2:] - objects.boxes[:, :2], axis=1)):
        assert (cue[near] > cue[far]).mean() == pytest.approx(0.5, abs=0.15)
