"""What the teachers must show, judged by the **stored** target: what their features say that the student cannot see.

Each is loaded as a user's hub folder is, its targets go through its codec, and linear probes read from them what it
teaches: better, one hopes, than from the student's own vision tower and from two-dimensional boxes.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from featurize.teachers.base import Teacher
from pipelines.demo_world.features import (
    GRID,
    SUB,
    Objects,
    box_features,
    decode,
    in_batches,
    load_teachers,
    patch_features,
    pool,
    scene_features,
    stored_targets,
    tower_features,
    whole_depth,
    whole_segmentation,
)
from pipelines.demo_world.matching import matched
from pipelines.demo_world.probes import Array, Labels, classify, miou, r2, ridge
from pipelines.demo_world.questions import Question, View
from pipelines.demo_world.samples import Samples
from pipelines.demo_world.scenes import CLASSES, PATTERNS
from pipelines.demo_world.solids import SHAPES
from pipelines.demo_world.train_generation import objects, patterns

T = TypeVar("T")
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
    patches, pooled = tower_features(weights / "student" / "vision", data)
    objects = Objects.of(data)
    depth = _depth(used["depth"], targets["depth"], patches, objects, data)
    seg = _segmentation(used["seg"], targets["seg"], patches, objects, data)
    gen = _generation(targets["gen"], np.concatenate([patches.mean(1), pooled], axis=1), data)
    return Measured(depth.probes | seg.probes | gen.probes, depth.outputs | seg.outputs | gen.outputs)


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
    for near, far in _clear_pairs(log_depth, scene):
        cues = bool(boxes[near, 3] > boxes[far, 3]), bool(size[near] > size[far])
        right.setdefault(cues, []).append(bool(predicted[near] < predicted[far]))
    return float(np.mean([np.mean(r) for r in right.values()])), float(np.mean(list(itertools.chain(*right.values()))))


def as_asked(objects: Objects) -> tuple[Labels, Labels]:
    """Pairs that boxes do not tell apart: `matched`, as questions are. Rows of nearer and farther ones (n,)."""
    views: list[View] = [
        (*box, foot) for box, foot in zip(objects.boxes.tolist(), objects.raised.tolist(), strict=True)
    ]
    asked = []
    for near, far in _clear_pairs(objects.log_depth[:, 0], objects.scene):
        names = str(near), str(far)
        asked.append(Question("Depth", "depth", names, names, 0, int(objects.scene[near]), (views[near], views[far])))
    groups = matched(asked, np.random.Generator(np.random.PCG64(0)), same_text=False)
    pairs = [(q.names[q.answer], q.names[1 - q.answer]) for group in groups for q in group]
    rows = np.array(pairs, np.int64).reshape(-1, 2)
    return rows[:, 0], rows[:, 1]


def counted(shape: Labels, predicted: Labels, scene: Labels) -> float:
    """Accuracy on how many of a shape a scene has, the mean over shapes and numbers 0 to 3, as they are asked.

    Args:
        shape: true, of every object (n,).
        predicted: (n,).
        scene: (n,).
    """
    numbers = [np.stack([np.bincount(scene, s == k) for k in range(len(SHAPES))]) for s in (shape, predicted)]
    there = np.bincount(scene) > 0
    true, found = (n[:, there] for n in numbers)
    right = [(found[k][true[k] == n] == n).mean() for k in range(len(SHAPES)) for n in range(4) if (true[k] == n).any()]
    return float(np.mean(right))


def _clear_pairs(log_depth: Array, scene: Labels) -> Iterator[tuple[int, int]]:
    """Rows of two objects of one scene, (nearer, farther), whose depths differ clearly."""
    for start, stop in itertools.pairwise(np.flatnonzero(np.diff(scene, prepend=-1, append=-1)).tolist()):
        for near, far in itertools.permutations(range(start, stop), 2):
            if log_depth[far] - log_depth[near] > np.log(CLEARLY):
                yield near, far


def _depth(teacher: Teacher, target: Tensor, tower: Array, objects: Objects, data: Samples) -> Measured:
    truth = torch.from_numpy(data.depth.astype(np.float32))
    things = torch.from_numpy(data.semantic >= CLASSES.index(SHAPES[0]))
    whole = in_batches(lambda rows: whole_depth(teacher, data, rows), data)
    decoded = in_batches(lambda rows: decode(teacher, target[rows]), data)

    def close(metres: Tensor) -> Tensor:
        return torch.maximum(metres / truth, truth / metres) < 1.25

    on_map = objects.seen_in(pool(decoded.log().numpy()).reshape(len(decoded), -1, 1))[:, 0]
    truths = objects.log_depth[:, 0], objects.scene, objects.boxes
    balanced, natural = ordinal(truths[0], on_map, *truths[1:])
    read = _three(
        lambda x: ridge(x, objects.log_depth, objects.scene),
        objects.seen_in(target.numpy()),
        objects.seen_in(tower),
        box_features(objects.boxes),
    )
    near, far = as_asked(objects)
    return Measured(
        {
            "depth: object log-depth, R²": {s: r2(objects.log_depth, y) for s, y in read.items()},
            "depth: nearer of two, balanced": {s: ordinal(truths[0], y[:, 0], *truths[1:])[0] for s, y in read.items()},
            "depth: nearer of two, as asked": {s: float((y[near] < y[far]).mean()) for s, y in read.items()},
        },
        {
            "depth: δ1, teacher": float(close(whole).float().mean()),
            "depth: δ1 on objects, teacher": float(close(whole)[things].float().mean()),
            "depth: δ1, decoded target": float(close(decoded).float().mean()),
            "depth: δ1 on objects, decoded target": float(close(decoded)[things].float().mean()),
            "depth: nearer of two, balanced, decoded target": balanced,
            "depth: nearer of two, as asked, decoded target": float((on_map[near] < on_map[far]).mean()),
            "depth: nearer of two, all pairs, decoded target": natural,
        },
    )


def _segmentation(teacher: Teacher, target: Tensor, tower: Array, objects: Objects, data: Samples) -> Measured:
    truth = data.semantic.astype(np.int64)
    whole = in_batches(lambda rows: whole_segmentation(teacher, data, rows), data)
    decoded = in_batches(lambda rows: decode(teacher, target[rows]), data)
    decoded = F.interpolate(decoded[:, None].float(), size=truth.shape[1:])[:, 0].long()
    by_class = miou(truth, whole.numpy(), len(CLASSES))
    cells = np.stack([pool(truth == c, GRID * SUB) for c in range(len(CLASSES))]).argmax(0)
    cells = cells.reshape(-1, GRID, SUB, GRID, SUB).swapaxes(2, 3).reshape(-1, SUB * SUB)  # a row per patch
    scene = np.repeat(np.arange(len(truth)), GRID * GRID)

    def masks(x: Array) -> float:
        # Hundreds of rows for every feature: the penalty hardly matters, so the weakest will do.
        found = classify(x.reshape(len(scene), -1), cells, len(CLASSES), scene, penalties=(1e-4,), folds=2)
        return float(miou(cells, found, len(CLASSES)).mean())

    def shapes(x: Array) -> Labels:
        return classify(x, objects.shape, len(SHAPES), objects.scene)[:, 0]

    read = _three(shapes, objects.seen_in(target.numpy()), objects.seen_in(tower), box_features(objects.boxes))
    shape = objects.shape[:, 0]
    return Measured(
        {
            "seg: object class, accuracy": {s: float((found == shape).mean()) for s, found in read.items()},
            "seg: objects of a shape, counted": {s: counted(shape, found, objects.scene) for s, found in read.items()},
            "seg: masks of 7 classes, mIoU": _three(masks, target.numpy(), tower, patch_features(data)),
        },
        {
            "seg: mIoU, teacher": float(by_class.mean()),
            "seg: mIoU, decoded target": float(miou(truth, decoded.numpy(), len(CLASSES)).mean()),
            **{f"seg: IoU of {name}, teacher": float(v) for name, v in zip(CLASSES, by_class, strict=True)},
        },
    )


def _generation(target: Tensor, tower: Array, data: Samples) -> Measured:
    """`tower`: mean of the patches and pooled output (n, d)."""
    counts = np.array([objects(scene) for scene in data.scenes], np.float64)
    surfaces = np.array([patterns(scene) for scene in data.scenes])
    scene = np.arange(len(data.scenes))
    wanted = target[:, 0].double().numpy()
    sources = wanted, tower, scene_features(data)
    return Measured(
        {
            "gen: objects of each colour and shape, R²": _three(
                lambda x: r2(counts, ridge(x, counts, scene)), *sources
            ),
            "gen: patterns of floor and wall, accuracy": _three(
                lambda x: float((classify(x, surfaces, len(PATTERNS), scene) == surfaces).mean()), *sources
            ),
        },
        {"gen: R² of the target, read from the tower": r2(wanted, ridge(tower, wanted, scene))},
    )


def _three(probe: Callable[[Array], T], target: Array, tower: Array, geometry: Array) -> dict[str, T]:
    return {"target": probe(target), "tower": probe(tower), "geometry": probe(geometry)}
