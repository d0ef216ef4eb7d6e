"""What a trained teacher must show: good output, and features from which the thing it teaches can be read."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipelines.demo_world import train_clip, train_depth, train_segmentation
from pipelines.demo_world.samples import Samples
from pipelines.demo_world.scenes import CLASSES

GRID = 8
Array = NDArray[np.float64]


@torch.no_grad()
def depth(model: Any, data: Samples) -> dict[str, float]:
    """δ1 (share of pixels whose depth is within a factor 1.25) of the teacher's output, over all pixels and over
    objects, and of the depth its head reads from the stored target alone; and R² of a linear probe on the target for
    objects' log-depth.
    """
    truth = torch.from_numpy(data.depth.astype(np.float32))
    things = torch.from_numpy(data.semantic >= CLASSES.index("sphere"))
    whole, alone, targets = [], [], []
    for rows in _batches(data):
        target, maps = train_depth.features(model, data.pixels(rows, train_depth.MEAN, train_depth.STD))
        whole.append(train_depth.predict(model, maps))
        alone.append(train_depth.predict(model, (F.pad(target, (0, 0, 1, 0)),) * len(maps)))
        targets.append(target)

    def within(parts: list[Tensor]) -> Tensor:
        ratio = torch.cat(parts) / truth
        return torch.maximum(ratio, 1 / ratio) < 1.25

    good = within(whole)
    return {
        "delta1": float(good.float().mean()),
        "delta1_objects": float(good[things].float().mean()),
        "delta1_from_target": float(within(alone).float().mean()),
        "probe_r2": _probe_depth(torch.cat(targets), data),
    }


@torch.no_grad()
def tower(model: Any, data: Samples) -> dict[str, float]:
    """R² for objects' log-depth of the same probe on the student's vision tower, and on box position and size alone."""
    features = [
        model(data.pixels(rows, train_clip.MEAN, train_clip.STD), output_hidden_states=True).hidden_states[-2]
        for rows in _batches(data)
    ]
    boxes, depths = [], []
    for scene, found in zip(data.scenes, data.boxes, strict=True):
        for index, box in enumerate(found):
            if box:
                left, top, right, bottom = box
                boxes.append([left + right, top + bottom, right - left, bottom - top, bottom])
                depths.append(np.log(scene.depth_of(index)))
    return {
        "probe_r2_tower": _probe_depth(torch.cat(features)[:, 1:], data),
        "probe_r2_boxes": _ridge(np.array(boxes), np.array(depths)[:, None]),
    }


@torch.no_grad()
def segmentation(model: Any, data: Samples) -> dict[str, float]:
    """mIoU of the whole teacher, and of its decoders fed the stored target alone; IoU per class of the former."""
    task = train_segmentation.task_tokens(train_segmentation.tokenizer())
    counts = {name: np.zeros((len(CLASSES), len(CLASSES))) for name in ("whole", "target")}
    for rows in _batches(data):
        maps = list(model.model.pixel_level_module.encoder(train_segmentation.pixels_of(data, rows)).feature_maps)
        target = F.interpolate(maps[-1], size=(GRID, GRID), mode="bilinear", align_corners=False)
        truth = data.semantic[rows].astype(np.int64)
        for name, used in (("whole", maps), ("target", train_segmentation.target_only(model, maps, target))):
            classes, masks = train_segmentation.segment(model, used, task)
            masks = F.interpolate(masks.sigmoid(), size=truth.shape[1:], mode="bilinear", align_corners=False)
            labels = torch.einsum("nqc,nqhw->nchw", classes.softmax(-1)[..., :-1], masks).argmax(1).numpy()
            np.add.at(counts[name], (truth.ravel(), labels.ravel()), 1)
    by_class = {name: np.diag(c) / (c.sum(0) + c.sum(1) - np.diag(c)) for name, c in counts.items()}
    return {
        "miou": float(by_class["whole"].mean()),
        "miou_from_target": float(by_class["target"].mean()),
        **{f"iou_{name}": float(v) for name, v in zip(CLASSES, by_class["whole"], strict=True)},
    }


@torch.no_grad()
def generation(teacher: Any, tower: Any, data: Samples) -> dict[str, float]:
    """R² of a linear map from the student's image embedding to the generation target: near 1, that would be trivial."""
    wanted, given = [], []
    for rows in _batches(data):
        pixels = data.pixels(rows, train_clip.MEAN, train_clip.STD)
        wanted.append(teacher(pixels).image_embeds)
        given.append(tower(pixels).pooler_output)
    return {"r2_from_tower": _ridge(torch.cat(given).double().numpy(), torch.cat(wanted).double().numpy())}


def _batches(data: Samples, size: int = 64) -> list[NDArray[np.int64]]:
    return np.array_split(np.arange(len(data.images)), -(-len(data.images) // size))


def _probe_depth(features: Tensor, data: Samples) -> float:
    """R² of ridge regression from an object's features (n, 64, width), averaged over its pixels, to its log-depth."""
    x, y = [], []
    for row, (scene, found) in enumerate(zip(data.scenes, data.boxes, strict=True)):
        for index, box in enumerate(found):
            if box:
                mask = torch.from_numpy(data.panoptic[row] == data.segment_ids[row][index]).float()
                share = F.avg_pool2d(mask[None], mask.shape[-1] // GRID).flatten()
                x.append((share @ features[row] / share.sum()).numpy())
                y.append([np.log(scene.depth_of(index))])
    return _ridge(np.array(x, np.float64), np.array(y))


def _ridge(x: Array, y: Array) -> float:
    """Held-out R² (last fifth of the rows) of ridge regression on standardised x (n, d), y (n, k)."""
    cut = len(x) * 4 // 5
    mean, std = x[:cut].mean(0), x[:cut].std(0) + 1e-9
    x = (x - mean) / std
    centre = y[:cut].mean(0)
    w = np.linalg.solve(x[:cut].T @ x[:cut] + 3.0 * np.eye(x.shape[1]), x[:cut].T @ (y[:cut] - centre))
    rest = y[cut:] - centre - x[cut:] @ w
    return float(1 - (rest**2).sum() / ((y[cut:] - y[cut:].mean(0)) ** 2).sum())
