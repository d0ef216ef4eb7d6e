"""What the teachers must show, judged by the **stored** target: what their features say that the student cannot see.

Each is loaded as a user's hub folder is, its targets go through its codec, and linear probes read from them what it
teaches: better, one hopes, than from the student's own vision tower and from two-dimensional boxes.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

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
from pipelines.demo_world import train_clip, train_segmentation
from pipelines.demo_world.probes import Array, Labels, classify, miou, r2, ridge
from pipelines.demo_world.samples import Samples
from pipelines.demo_world.scenes import CLASSES, COLOURS, PATTERNS
from pipelines.demo_world.solids import SHAPES

T = TypeVar("T")
BATCH = 64
GRID = 8  # patches along a side, of dense targets and of the tower
SUB = 2  # parts of a patch along a side, in which masks are probed
CLEARLY = 1.15  # ratio of two objects' depths below which their order is not asked, as in the benchmark


@dataclass(frozen=True)
class Measured:
    """What is measured on a folder of weights.

    Attributes:
        probes: name → what is read from (``target``, ``tower``, ``geometry``) → R², accuracy or mIoU.
        outputs: name → value, of what the teachers' own heads and decoders make of an image or a stored target.
    """

    probes: dict[str, dict[str, float]]
    outputs: dict[str, float]


@dataclass(frozen=True)
class Objects:
    """The visible objects of some scenes, one row each."""

    scene: Labels  # (n,)
    shares: Array  # of the object's pixels in each patch (n, patches); rows sum to 1
    boxes: Array  # left, top, right, bottom in [0, 1] (n, 4)
    log_depth: Array  # of the centre, metres (n, 1)
    shape: Labels  # (n, 1)

    @staticmethod
    def of(data: Samples) -> "Objects":
        """Those of all scenes, scene after scene."""
        rows = [(s, i, box) for s, found in enumerate(data.boxes) for i, box in enumerate(found) if box]
        masks = np.stack([data.panoptic[s] == data.segment_ids[s][i] for s, i, _ in rows])
        shares = _pool(masks).reshape(len(rows), -1)
        return Objects(
            scene=np.array([s for s, _, _ in rows]),
            shares=shares / shares.sum(1, keepdims=True),
            boxes=np.array([box for _, _, box in rows]),
            log_depth=np.log([[data.scenes[s].depth_of(i)] for s, i, _ in rows]),
            shape=np.array([[SHAPES.index(data.scenes[s].objects[i].solid.shape)] for s, i, _ in rows]),
        )

    def seen_in(self, patches: Array) -> Array:
        """Features of patches (scenes, patches, d) averaged over each object's pixels (n, d)."""
        seen: Array = np.einsum("np,npd->nd", self.shares, patches[self.scene])
        return seen


def measure(weights: Path, data: Samples) -> Measured:
    """Every gate but those that only training can measure.

    Args:
        weights: a folder as the recipe makes it.
        data: scenes nothing was trained on.

    Raises:
        OlaError: weights are missing, or not what ``demo.yaml``, which says how they are used, expects.
    """
    used = load_teachers(weights)
    targets = {task: stored_targets(teacher, data) for task, teacher in used.items()}
    patches, pooled = _tower(weights / "student" / "vision", data)
    objects = Objects.of(data)
    depth = _depth(used["depth"], targets["depth"], patches, objects, data)
    seg = _segmentation(used["seg"], targets["seg"], patches, objects, data)
    gen = _generation(targets["gen"], np.concatenate([patches.mean(1), pooled], axis=1), data)
    return Measured(depth.probes | seg.probes | gen.probes, depth.outputs | seg.outputs | gen.outputs)


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

    return _in_batches(stored, data)


def ordinal(log_depth: Array, predicted: Array, scene: Labels, boxes: Array) -> tuple[float, float]:
    """Accuracy on which of two objects is nearer: (balanced, over all pairs).

    Balanced is the mean over four kinds of pairs: the nearer stands lower in the image or does not, and looks bigger
    or does not. Neither cue then tells anything.

    Args:
        log_depth: true (n,); pairs of one scene whose depths differ clearly are asked.
        predicted: (n,), in any unit that grows with depth.
        scene: (n,).
        boxes: (n, 4).
    """
    size = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    right: dict[tuple[bool, bool], list[bool]] = {}
    for start, stop in itertools.pairwise(np.flatnonzero(np.diff(scene, prepend=-1, append=-1)).tolist()):
        for near, far in itertools.permutations(range(start, stop), 2):
            if log_depth[far] - log_depth[near] > np.log(CLEARLY):
                cues = bool(boxes[near, 3] > boxes[far, 3]), bool(size[near] > size[far])
                right.setdefault(cues, []).append(bool(predicted[near] < predicted[far]))
    return float(np.mean([np.mean(r) for r in right.values()])), float(np.mean(list(itertools.chain(*right.values()))))


def _depth(teacher: Teacher, target: Tensor, tower: Array, objects: Objects, data: Samples) -> Measured:
    truth = torch.from_numpy(data.depth.astype(np.float32))
    things = torch.from_numpy(data.semantic >= CLASSES.index(SHAPES[0]))
    whole = _in_batches(lambda rows: whole_depth(teacher, data, rows), data)
    decoded = _in_batches(lambda rows: decode(teacher, target[rows]), data)

    def close(metres: Tensor) -> Tensor:
        return torch.maximum(metres / truth, truth / metres) < 1.25

    on_map = objects.seen_in(_pool(decoded.log().numpy()).reshape(len(decoded), -1, 1))[:, 0]
    truths = objects.log_depth[:, 0], objects.scene, objects.boxes
    balanced, natural = ordinal(truths[0], on_map, *truths[1:])
    read = _three(
        lambda x: ridge(x, objects.log_depth, objects.scene),
        objects.seen_in(target.numpy()),
        objects.seen_in(tower),
        _box_features(objects.boxes),
    )
    return Measured(
        {
            "depth: object log-depth, R²": {s: r2(objects.log_depth, y) for s, y in read.items()},
            "depth: nearer of two, balanced": {s: ordinal(truths[0], y[:, 0], *truths[1:])[0] for s, y in read.items()},
        },
        {
            "depth: δ1, teacher": float(close(whole).float().mean()),
            "depth: δ1 on objects, teacher": float(close(whole)[things].float().mean()),
            "depth: δ1, decoded target": float(close(decoded).float().mean()),
            "depth: δ1 on objects, decoded target": float(close(decoded)[things].float().mean()),
            "depth: nearer of two, balanced, decoded target": balanced,
            "depth: nearer of two, all pairs, decoded target": natural,
        },
    )


def _segmentation(teacher: Teacher, target: Tensor, tower: Array, objects: Objects, data: Samples) -> Measured:
    truth = data.semantic.astype(np.int64)
    whole = _in_batches(lambda rows: whole_segmentation(teacher, data, rows), data)
    decoded = _in_batches(lambda rows: decode(teacher, target[rows]), data)
    decoded = F.interpolate(decoded[:, None].float(), size=truth.shape[1:])[:, 0].long()
    by_class = miou(truth, whole.numpy(), len(CLASSES))
    cells = np.stack([_pool(truth == c, GRID * SUB) for c in range(len(CLASSES))]).argmax(0)
    cells = cells.reshape(-1, GRID, SUB, GRID, SUB).swapaxes(2, 3).reshape(-1, SUB * SUB)  # a row per patch
    scene = np.repeat(np.arange(len(truth)), GRID * GRID)

    def masks(x: Array) -> float:
        # Hundreds of rows for every feature: the penalty hardly matters, so the weakest will do.
        found = classify(x.reshape(len(scene), -1), cells, len(CLASSES), scene, penalties=(1e-4,), folds=2)
        return float(miou(cells, found, len(CLASSES)).mean())

    def shapes(x: Array) -> float:
        return float((classify(x, objects.shape, len(SHAPES), objects.scene) == objects.shape).mean())

    return Measured(
        {
            "seg: object class, accuracy": _three(
                shapes, objects.seen_in(target.numpy()), objects.seen_in(tower), _box_features(objects.boxes)
            ),
            "seg: masks of 7 classes, mIoU": _three(masks, target.numpy(), tower, _patch_features(data)),
        },
        {
            "seg: mIoU, teacher": float(by_class.mean()),
            "seg: mIoU, decoded target": float(miou(truth, decoded.numpy(), len(CLASSES)).mean()),
            **{f"seg: IoU of {name}, teacher": float(v) for name, v in zip(CLASSES, by_class, strict=True)},
        },
    )


def _generation(target: Tensor, tower: Array, data: Samples) -> Measured:
    """`tower`: mean of the patches and pooled output (n, d)."""
    counts = np.array(
        [
            [sum(o.colour == c for o in s.objects) for c in COLOURS]
            + [sum(o.solid.shape == c for o in s.objects) for c in SHAPES]
            for s in data.scenes
        ],
        np.float64,
    )
    patterns = np.array([[PATTERNS.index(s.floor.pattern), PATTERNS.index(s.wall.pattern)] for s in data.scenes])
    scene = np.arange(len(data.scenes))
    wanted = target[:, 0].double().numpy()
    sources = wanted, tower, _scene_features(data)
    return Measured(
        {
            "gen: objects of each colour and shape, R²": _three(
                lambda x: r2(counts, ridge(x, counts, scene)), *sources
            ),
            "gen: patterns of floor and wall, accuracy": _three(
                lambda x: float((classify(x, patterns, len(PATTERNS), scene) == patterns).mean()), *sources
            ),
        },
        {"gen: R² of the target, read from the tower": r2(wanted, ridge(tower, wanted, scene))},
    )


def _three(probe: Callable[[Array], T], target: Array, tower: Array, geometry: Array) -> dict[str, T]:
    return {"target": probe(target), "tower": probe(tower), "geometry": probe(geometry)}


def _box_features(boxes: Array) -> Array:
    """Centre, width, height and foot of boxes (n, 4), with squares and products (n, 20)."""
    left, top, right, bottom = boxes.T
    return _quadratic(np.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top, bottom], axis=1))


def _scene_features(data: Samples) -> Array:
    """All boxes of a scene from left to right, each as in `_box_features`, zeros where there are no more (n, d)."""
    found = [np.array(sorted(box for box in boxes if box)) for boxes in data.boxes]
    padded = np.zeros((len(found), max(map(len, found)), 21))
    for row, boxes in enumerate(found):
        padded[row, : len(boxes)] = np.concatenate([np.ones((len(boxes), 1)), _box_features(boxes)], axis=1)
    return padded.reshape(len(found), -1)


def _patch_features(data: Samples) -> Array:
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


def _pool(maps: Any, grid: int = GRID) -> Array:
    """Means over the cells of a grid: maps (n, side, side) → (n, grid, grid)."""
    side = maps.shape[-1] // grid
    return np.asarray(maps.reshape(-1, grid, side, grid, side).mean((2, 4)), np.float64)


@torch.no_grad()
def _in_batches(make: Callable[[Labels], Tensor], data: Samples) -> Tensor:
    rows = np.arange(len(data.images))
    return torch.cat([make(part) for part in np.array_split(rows, -(-len(rows) // BATCH))])


def _pixels(teacher: Teacher, data: Samples, rows: Labels) -> Tensor:
    return torch.stack([teacher.preprocess(Image.fromarray(image)) for image in data.images[rows]])


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
def _tower(folder: Path, data: Samples) -> tuple[Array, Array]:
    """What the student sees, the patches of its tower's last layer but one (n, patches, d); and the pooled output."""
    model = CLIPVisionModel.from_pretrained(folder, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
    patches, pooled = [], []
    for rows in np.array_split(np.arange(len(data.images)), -(-len(data.images) // BATCH)):
        out = model(data.pixels(rows, train_clip.MEAN, train_clip.STD), output_hidden_states=True)
        patches.append(out.hidden_states[-2][:, 1:])
        pooled.append(out.pooler_output)
    return torch.cat(patches).double().numpy(), torch.cat(pooled).double().numpy()
