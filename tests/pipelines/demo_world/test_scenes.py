from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipelines.demo_world.processes import render_split
from pipelines.demo_world.scenes import CLASSES, LEVELS, SPLITS, Level, render, sample_scene, scene_seed
from pipelines.demo_world.solids import Solid, intersect, normals_at

SEEDS = st.integers(0, 10**12)
HARDNESS = st.sampled_from(list(LEVELS.values()))
SOLIDS = st.builds(
    Solid,
    shape=st.sampled_from(["sphere", "box", "cylinder", "cone"]),
    base=st.tuples(st.floats(-1, 1), st.floats(3, 8), st.floats(0, 1)),
    radius=st.floats(0.2, 1),
    height=st.floats(0.4, 2),
    yaw=st.floats(0, 1.5),
    rgb=st.just((1.0, 0.0, 0.0)),
).map(lambda solid: replace(solid, height=2 * solid.radius) if solid.shape == "sphere" else solid)


@settings(max_examples=20, deadline=None)
@given(SEEDS, HARDNESS)
def test_same_seed_same_pixels(seed: int, level: Level) -> None:
    scene = sample_scene(seed, level)
    assert scene == sample_scene(seed, level)
    once, twice = render(scene), render(scene)
    assert (once.image == twice.image).all()
    assert (once.depth == twice.depth).all()
    assert (once.panoptic == twice.panoptic).all()


@settings(max_examples=30, deadline=None)
@given(SEEDS, HARDNESS)
def test_scenes_can_be_talked_about(seed: int, level: Level) -> None:
    scene = sample_scene(seed, level)
    assert level.objects[0] <= len(scene.objects) <= level.objects[1]
    names = [item.name for item in scene.objects]
    assert len(set(names)) == len(names)
    rendering = render(scene)
    for index in range(len(names)):
        box = rendering.box(index)
        assert box is not None
        assert 0 <= box[0] < box[2] <= 1
        assert 0 <= box[1] < box[3] <= 1


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_numbers_of_objects_are_equally_frequent(level: Level) -> None:
    numbers = range(level.objects[0], level.objects[1] + 1)
    counts = Counter(len(sample_scene(seed, level).objects) for seed in range(50 * len(numbers)))
    assert set(counts) == set(numbers)
    assert all(25 < count < 75 for count in counts.values())


def test_hard_scenes_hide_more() -> None:
    """Share of objects of which others hide a tenth or more."""

    def hidden(level: Level) -> float:
        shares = []
        for scene in (sample_scene(seed, level) for seed in range(30)):
            rendering = render(scene)
            for index, item in enumerate(scene.objects):
                alone = render(replace(scene, objects=(item,)))
                shares.append(1 - rendering.pixels(index) / alone.pixels(0))
        return float(np.mean([share > 0.1 for share in shares]))

    assert hidden(LEVELS["easy"]) < 0.1 < 0.15 < hidden(LEVELS["hard"])


@settings(max_examples=20, deadline=None)
@given(SEEDS, HARDNESS)
def test_depth_and_panoptic_agree(seed: int, level: Level) -> None:
    """Unprojected by depth, every pixel lies where its segment is, and no solid is in front of it."""
    scene = sample_scene(seed, level)
    rendering = render(scene)
    size = level.size
    assert rendering.image.shape == (size, size, 3)
    assert rendering.image.dtype == np.uint8
    assert rendering.depth.dtype == np.float32
    assert rendering.panoptic.dtype == np.int32
    steps = (np.arange(size) + 0.5) / size * 2 - 1
    u, v = np.meshgrid(steps * scene.camera.tan_half_fov, -steps * scene.camera.tan_half_fov)
    rays = np.stack([u, v, np.ones_like(u)], axis=-1) @ scene.camera.axes
    origin = np.array([0, 0, scene.camera.height])
    points = origin + rendering.depth[..., None] * rays
    for segment in rendering.segments:
        mine = points[rendering.panoptic == segment.id]
        if segment.category == "floor":
            np.testing.assert_allclose(mine[:, 2], 0, atol=1e-3)
        elif segment.category != "wall":
            assert segment.object is not None
            item = scene.objects[segment.object]
            solid = item.pedestal if segment.category == "pedestal" else item.solid
            assert solid is not None
            assert (np.linalg.norm(mine - solid.centre, axis=1) <= solid.bound + 1e-2).all()
            core = replace(solid, radius=0.99 * solid.radius, height=0.99 * solid.height)  # what grazes may miss
            assert (rendering.depth <= intersect(core, origin, np.moveaxis(rays, -1, 0)) + 1e-3).all()
    assert set(np.unique(rendering.panoptic)) <= {segment.id for segment in rendering.segments}
    assert rendering.semantic().max() < len(CLASSES)


@settings(max_examples=60, deadline=None)
@given(SOLIDS, st.integers(0, 1000))
@example(Solid("cylinder", (0.0, 3.0, 0.359375), 1.0, 0.59865, 0.0, (1.0, 0.0, 0.0)), 1000)  # within a mm of the rim
def test_rays_meet_surfaces_from_outside(solid: Solid, seed: int) -> None:
    origin = np.array([0.0, 0.0, 3.5])
    aims = solid.centre + np.random.default_rng(seed).normal(0, 0.4, (50, 3)) * solid.radius
    rays = aims - origin
    t = intersect(solid, origin, rays.T)
    hit = np.isfinite(t)
    points = origin + t[hit, None] * rays[hit]
    assert (np.linalg.norm(points - solid.centre, axis=1) <= solid.bound + 1e-3).all()
    normals = normals_at(solid, points.T).T
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-4)
    assert ((normals * rays[hit]).sum(1) <= 1e-3).all()


def test_sphere_is_met_at_its_radius() -> None:
    ball = Solid("sphere", (0.0, 5.0, 0.0), 1.0, 2.0, 0.0, (1.0, 0.0, 0.0))
    rays = np.array([[0.0, 1.0, 0.0], [0.0, -1.0, 0.0], [1.0, 0.0, 0.0]])
    np.testing.assert_allclose(intersect(ball, np.array([0.0, 0.0, 1.0]), rays.T), [4.0, np.inf, np.inf])


def test_splits_never_share_a_scene() -> None:
    seeds = [scene_seed(split, index, seed) for split in SPLITS for seed in range(3) for index in (0, 1, 10**8 - 1)]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_change_nothing(workers: int) -> None:
    rendered = list(render_split("probe", 101, workers=workers))
    assert [scene for scene, _ in rendered] == [sample_scene(scene_seed("probe", i)) for i in range(101)]
    assert (rendered[100][1].image == render(rendered[100][0]).image).all()
