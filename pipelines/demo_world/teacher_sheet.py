"""``teachers.png``: what the teachers see in scenes they were not trained on, for a person to judge."""

from pathlib import Path

import numpy as np
import torch.nn.functional as F

from pipelines.demo_world.features import decode, load_teachers, stored_targets, whole_depth, whole_segmentation
from pipelines.demo_world.samples import Samples
from pipelines.demo_world.sheet import save, sheet, show_classes, show_depth, show_image

COLUMNS = (
    "image",
    "true depth",
    "depth teacher",
    "its target, decoded",
    "true classes",
    "seg teacher",
    "its target, decoded",
    "nearest by gen target",
    "second nearest",
)


def teacher_sheet(out: Path, weights: Path, data: Samples, scenes: int = 6) -> None:
    """Write a PNG: a row for each of the first `scenes`; nearest by cosine among all of `data`."""
    teachers = load_teachers(weights)
    rows = np.arange(scenes)
    targets = {task: stored_targets(teachers[task], data) for task in ("depth", "seg", "gen")}
    depth, seg = teachers["depth"], teachers["seg"]
    depths = [
        data.depth[:scenes].astype(np.float32),
        whole_depth(depth, data, rows).numpy(),
        decode(depth, targets["depth"][:scenes]).numpy(),
    ]
    classes = [
        data.semantic[:scenes],
        whole_segmentation(seg, data, rows).numpy(),
        decode(seg, targets["seg"][:scenes]).numpy(),
    ]
    meant = F.normalize(targets["gen"][:, 0], dim=-1)
    alike = (meant[:scenes] @ meant.T).argsort(descending=True)[:, 1:3]  # the first is the image itself
    figure, grid = sheet(scenes, COLUMNS)
    for row, tiles in enumerate(grid):
        show_image(tiles[0], data.images[row])
        for tile, metres in zip(tiles[1:4], depths, strict=True):
            show_depth(tile, metres[row])
        for tile, labels in zip(tiles[4:7], classes, strict=True):
            show_classes(tile, labels[row])
        for tile, other in zip(tiles[7:9], alike[row].tolist(), strict=True):
            show_image(tile, data.images[other])
    save(figure, out)
