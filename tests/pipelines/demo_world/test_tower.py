import numpy as np
import torch

from pipelines.demo_world.clip import positions
from pipelines.demo_world.places import layout, places, segment_names
from pipelines.demo_world.processes import render_split
from pipelines.demo_world.samples import render_samples
from pipelines.demo_world.train_tower import maps, mirrored, told_of_patches


def test_map_of_a_sample_is_that_of_its_rendering() -> None:
    rendered = render_split("gates", 40, workers=1)
    expected = [layout(rendering.panoptic, segment_names(scene, rendering)) for scene, rendering in rendered]
    assert maps(render_samples("gates", 40, workers=1)) == expected


def test_position_codes_tell_rows_and_columns() -> None:
    code = positions(8, 96).view(8, 8, 96)
    torch.testing.assert_close(code[3, :, :48], code[3, 0, :48].expand(8, 48))
    torch.testing.assert_close(code[:, 5, 48:], code[0, 5, 48:].expand(8, 48))
    apart = torch.cdist(code[0, :, 48:], code[0, :, 48:])
    assert (apart + torch.eye(8) * 99).min() > 1
    assert (apart[0].diff() > 0).all()  # the farther, the less alike


def test_nothing_is_told_of_a_map_without_objects() -> None:
    assert places(["wall"] * 64, np.random.default_rng(0)) == ""


def test_what_is_told_of_a_mirrored_image_is_what_its_mirrored_map_tells() -> None:
    cells = [f"red {shape}" for shape in ("box", "cone")] + ["floor"] * 61 + ["blue sphere"]
    flipped = [cells[row + 7 - column] for row in range(0, 64, 8) for column in range(8)]
    told = torch.tensor([told_of_patches(cells), told_of_patches(flipped)])
    assert torch.equal(mirrored(told), told.flip(0))
