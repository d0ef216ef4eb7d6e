"""Rendered scenes as arrays, for training and gating the teachers."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.demo_world.processes import render_split
from pipelines.demo_world.scenes import EASY, Level, Scene

SIZE = EASY.size  # of the images the teachers are trained on


@dataclass(frozen=True)
class Samples:
    """`n` scenes; everything about pixels as one array each."""

    scenes: list[Scene]
    images: NDArray[np.uint8]  # (n, size, size, 3)
    depth: NDArray[np.float16]  # (n, size, size) metres
    semantic: NDArray[np.uint8]  # (n, size, size) indices into CLASSES
    panoptic: NDArray[np.uint8]  # (n, size, size) segment ids
    boxes: list[list[tuple[float, float, float, float] | None]]  # per scene and object, in [0, 1]
    segment_ids: list[list[int]]  # per scene and object, ids in `panoptic`

    def pixels(self, rows: NDArray[np.int64], mean: list[float], std: list[float]) -> Tensor:
        """Normalised images, float32 (len(rows), 3, size, size)."""
        images = torch.from_numpy(self.images[rows]).permute(0, 3, 1, 2).float() / 255
        return (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def render_samples(split: str, count: int, seed: int = 0, workers: int = 2, level: Level = EASY) -> Samples:
    """The first `count` scenes of a split, rendered by `workers` processes, whose number does not matter."""
    scenes, renderings = zip(*render_split(split, count, seed, workers, level), strict=True)
    return Samples(
        scenes=list(scenes),
        images=np.stack([r.image for r in renderings]),
        depth=np.stack([r.depth for r in renderings]).astype(np.float16),
        semantic=np.stack([r.semantic() for r in renderings]).astype(np.uint8),
        panoptic=np.stack([r.panoptic for r in renderings]).astype(np.uint8),
        boxes=[[r.box(i) for i in range(len(s.objects))] for s, r in zip(scenes, renderings, strict=True)],
        segment_ids=[[r.segment_id(i) for i in range(len(s.objects))] for s, r in zip(scenes, renderings, strict=True)],
    )


def batches(count: int, batch: int, steps: int, seed: int) -> Iterable[NDArray[np.int64]]:
    """`steps` batches of row numbers, epoch after epoch in a fresh order, incomplete batches dropped."""
    rng = np.random.Generator(np.random.PCG64(seed))
    done = 0
    while done < steps:
        order = rng.permutation(count)
        for start in range(0, count - batch + 1, batch):
            if done == steps:
                return
            yield order[start : start + batch]
            done += 1


def fit(
    name: str,
    parameters: list[torch.nn.Parameter],
    loss: Callable[[NDArray[np.int64]], Tensor],
    rows: int,
    batch: int,
    steps: int,
    lr: float,
    seed: int = 0,
) -> float:
    """AdamW with 5 % warm-up and cosine decay over `steps` batches of row numbers. Returns CPU seconds taken."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
    warmup = max(steps // 20, 1)

    def scale(step: int) -> float:
        return min((step + 1) / warmup, 0.5 * (1 + float(np.cos(np.pi * step / steps))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    start = time.process_time()
    recent: list[float] = []
    for step, chosen in enumerate(batches(rows, batch, steps, seed), 1):
        value = loss(chosen)
        optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        recent.append(value.item())
        if step % max(steps // 10, 1) == 0:
            seconds = time.process_time() - start
            print(f"{name}: step {step}/{steps}  loss {np.mean(recent):.4f}  {seconds:.0f} s", flush=True)
            recent.clear()
    return time.process_time() - start
