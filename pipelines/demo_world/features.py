"""What probes read from: stored targets, the student's tower, 2-D boxes; and what teachers make of images."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionModel

from featurize import teachers
from featurize.teachers.base import Teacher
from olavlm.config import load_pipeline
from olavlm.data import codec
from pipelines.demo_world import clip, train_segmentation
from pipelines.demo_world.probes import Array, Labels
from pipelines.demo_world.samples import Samples
from pipelines.demo_world.solids import SHAPES

BATCH = 64
GRID = 8  # patches along a side, of dense targets and of the tower
SUB = 2  # parts of a patch along a side, in which masks are probed


def load_teachers(weights: Path) -> dict[str, Teacher]:
    """The teachers of a folder, by task, as ``demo.yaml`` has them but for where they lie; errors as in `measure`."""
    paths = [f"teachers.{task}.weights={weights / task}" for task in ("depth", "seg", "gen")]
    return {task: teachers.load(config) for task, config in load_pipeline("demo", paths).teachers.items()}


def stored_targets(teacher: Teacher, data: Samples) -> Tensor:
    """What a training reads back from the store, (n, tokens, width) float32."""
    kind = teacher.config.codec

    def stored(rows: Labels) -> Tensor:
        values, scales = codec.encode(teacher.encode(_pixels(teacher, data, rows)), kind)
        return codec.decode(torch.from_numpy(values), None if scales is None else torch.from_numpy(scales), kind)

    return in_batches(stored, data)


def decode(teacher: Teacher, target: Tensor) -> Tensor:
    """What the teacher's own head makes of targets alone: metres or labels (n, side, side)."""
    decoded = teacher.decode(target)
    assert decoded is not None
    return decoded


@torch.no_grad()
def whole_depth(teacher: Teacher, data: Samples, rows: Labels) -> Tensor:
    """Metres (n, side, side) by the whole network."""
    metres: Tensor = teacher.model(_pixels(teacher, data, rows)).predicted_depth
    return metres


@torch.no_grad()
def whole_segmentation(teacher: Teacher, data: Samples, rows: Labels) -> Tensor:
    """Labels (n, side, side) by the whole network and the processor's rule for semantic maps."""
    task = train_segmentation.task_tokens(train_segmentation.tokenizer())
    out = teacher.model(_pixels(teacher, data, rows), task.expand(len(rows), -1))
    masks = F.interpolate(out.masks_queries_logits.sigmoid(), size=data.semantic.shape[1:], mode="bilinear")
    return torch.einsum("nqc,nqhw->nchw", out.class_queries_logits.softmax(-1)[..., :-1], masks).argmax(1)


@torch.no_grad()
def tower_features(folder: Path, data: Samples) -> tuple[Array, Array]:
    """What the student sees, the patches of its tower's last layer but one (n, patches, d); and the pooled output."""
    model = CLIPVisionModel.from_pretrained(folder, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
    patches, pooled = [], []
    for rows in np.array_split(np.arange(len(data.images)), -(-len(data.images) // BATCH)):
        out = model(data.pixels(rows, clip.MEAN, clip.STD), output_hidden_states=True)
        patches.append(out.hidden_states[-2][:, 1:])
        pooled.append(out.pooler_output)
    return torch.cat(patches).double().numpy(), torch.cat(pooled).double().numpy()


@dataclass(frozen=True)
class Objects:
    """The visible objects of some scenes, one row each."""

    scene: Labels  # (n,)
    shares: Array  # of the object's pixels in each patch (n, patches); rows sum to 1
    boxes: Array  # left, top, right, bottom in [0, 1] (n, 4)
    raised: Array  # 1 if on a pedestal (n,)
    log_depth: Array  # of the centre, metres (n, 1)
    shape: Labels  # (n, 1)

    @staticmethod
    def of(data: Samples) -> "Objects":
        """Those of all scenes, scene after scene."""
        rows = [(s, i, box) for s, found in enumerate(data.boxes) for i, box in enumerate(found) if box]
        masks = np.stack([data.panoptic[s] == data.segment_ids[s][i] for s, i, _ in rows])
        shares = pool(masks).reshape(len(rows), -1)
        return Objects(
            scene=np.array([s for s, _, _ in rows]),
            shares=shares / shares.sum(1, keepdims=True),
            boxes=np.array([box for _, _, box in rows]),
            raised=np.array([float(data.scenes[s].objects[i].pedestal is not None) for s, i, _ in rows]),
            log_depth=np.log([[data.scenes[s].depth_of(i)] for s, i, _ in rows]),
            shape=np.array([[SHAPES.index(data.scenes[s].objects[i].solid.shape)] for s, i, _ in rows]),
        )

    def seen_in(self, patches: Array) -> Array:
        """Features of patches (scenes, patches, d) averaged over each object's pixels (n, d)."""
        seen: Array = np.einsum("np,npd->nd", self.shares, patches[self.scene])
        return seen


def box_features(boxes: Array) -> Array:
    """Centre, width, height and foot of boxes (n, 4), with squares and products (n, 20)."""
    left, top, right, bottom = boxes.T
    return _quadratic(np.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top, bottom], axis=1))


def scene_features(data: Samples) -> Array:
    """All boxes of a scene from left to right, each as in `box_features`, zeros where there are no more (n, d)."""
    found = [np.array(sorted(box for box in boxes if box)) for boxes in data.boxes]
    padded = np.zeros((len(found), max(map(len, found)), 21))
    for row, boxes in enumerate(found):
        padded[row, : len(boxes)] = np.concatenate([np.ones((len(boxes), 1)), box_features(boxes)], axis=1)
    return padded.reshape(len(found), -1)


def patch_features(data: Samples) -> Array:
    """What boxes say of every patch (n, patches, d).

    Its place, how much of each of its parts lies in boxes, the size of the box that covers it most, and where in that
    box it is; with squares and products of the latter two and of the place.
    """
    edges = np.arange(GRID * SUB) / (GRID * SUB)
    centres = (np.stack(np.meshgrid(np.arange(GRID), np.arange(GRID)), axis=-1).reshape(-1, 2) + 0.5) / GRID
    rows = []
    for found in data.boxes:
        boxes = np.array([box for box in found if box]).reshape(-1, 4)
        along = [
            np.clip(np.minimum(edges + edges[1], boxes[:, i + 2, None]) - np.maximum(edges, boxes[:, i, None]), 0, None)
            for i in (0, 1)
        ]
        covered = along[1][:, :, None] * along[0][:, None, :] / edges[1] ** 2  # (boxes, 16, 16)
        parts = covered.max(0).reshape(GRID, SUB, GRID, SUB).swapaxes(1, 2).reshape(GRID * GRID, SUB * SUB)
        by_patch = covered.reshape(-1, GRID, SUB, GRID, SUB).mean((2, 4)).reshape(len(boxes), -1)
        most, box = by_patch.max(0), boxes[by_patch.argmax(0)]
        size = box[:, 2:] - box[:, :2]
        inside = (centres - box[:, :2]) / size
        about = (most > 0)[:, None] * np.concatenate([size, inside.clip(-1, 2), most[:, None]], axis=1)
        rows.append(np.concatenate([parts, _quadratic(centres), _quadratic(about)], axis=1))
    return np.stack(rows)


def _quadratic(x: Array) -> Array:
    """Columns (n, d) and all their products of two."""
    pairs = itertools.combinations_with_replacement(range(x.shape[1]), 2)
    return np.concatenate([x, np.stack([x[:, i] * x[:, j] for i, j in pairs], axis=1)], axis=1)


def pool(maps: Any, grid: int = GRID) -> Array:
    """Means over the cells of a grid: maps (n, side, side) → (n, grid, grid)."""
    side = maps.shape[-1] // grid
    return np.asarray(maps.reshape(-1, grid, side, grid, side).mean((2, 4)), np.float64)


@torch.no_grad()
def in_batches(make: Callable[[Labels], Tensor], data: Samples) -> Tensor:
    """What `make` makes of row numbers, `BATCH` at a time, for all of `data`."""
    rows = np.arange(len(data.images))
    return torch.cat([make(part) for part in np.array_split(rows, -(-len(rows) // BATCH))])


def _pixels(teacher: Teacher, data: Samples, rows: Labels) -> Tensor:
    return torch.stack([teacher.preprocess(Image.fromarray(image)) for image in data.images[rows]])
