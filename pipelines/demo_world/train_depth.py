"""The depth teacher: DepthAnything with a Dinov2 backbone, metric depth, trained on rendered truth."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

from pipelines.demo_world.samples import SIZE, Samples, fit
from pipelines.demo_world.scenes import CLASSES

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
MAX_DEPTH = 20
WIDTH, LAYERS, PATCH = 96, 4, 8


def build() -> DepthAnythingForDepthEstimation:
    """An untrained teacher: every block feeds the DPT neck, as the target takes the mean of every block."""
    backbone = Dinov2Config(  # type: ignore[call-arg]
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=3,
        mlp_ratio=4,
        image_size=SIZE,
        patch_size=PATCH,
        layerscale_value=1.0,
        out_indices=list(range(1, LAYERS + 1)),
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=PATCH,
        reassemble_hidden_size=WIDTH,
        reassemble_factors=[2, 1, 1, 0.5],
        neck_hidden_sizes=[24, 32, 48, 48],
        fusion_hidden_size=24,
        head_hidden_size=24,
        depth_estimation_type="metric",
        max_depth=MAX_DEPTH,
    )
    return DepthAnythingForDepthEstimation(config)


def features(model: DepthAnythingForDepthEstimation, pixels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The target (n, 64, 96), the mean of all blocks' final-norm'ed outputs without CLS; and the maps for the neck."""
    maps = model.backbone(pixels).feature_maps
    return torch.stack([m[:, 1:] for m in maps]).mean(0), maps


def predict(model: DepthAnythingForDepthEstimation, maps: tuple[Tensor, ...]) -> Tensor:
    """Metres, (n, 64, 64), from the backbone's maps."""
    grid = SIZE // PATCH
    metres: Tensor = model.head(model.neck(list(maps), grid, grid), grid, grid)
    return metres


def train(data: Samples, steps: int, batch: int = 16, seed: int = 0) -> tuple[DepthAnythingForDepthEstimation, float]:
    """Train from scratch; returns (model in eval mode, CPU seconds).

    The DPT head alone learns to do all the work and leaves the backbone's features poor, yet it is these that are
    distilled: a linear head, dropped afterwards, must therefore read every patch's 4 × 4 log-depths from the target
    itself.
    """
    torch.manual_seed(seed)
    model = build().train()
    reader = nn.Linear(WIDTH, 16)
    things = CLASSES.index("pedestal")

    def loss(rows: NDArray[np.int64]) -> Tensor:
        pixels = data.pixels(rows, MEAN, STD)
        truth = torch.from_numpy(data.depth[rows].astype(np.float32)).log()
        weight = 1 + 3.0 * torch.from_numpy(data.semantic[rows] >= things)
        if rows[0] % 2:  # mirrored scenes are scenes
            pixels, truth, weight = pixels.flip(-1), truth.flip(-1), weight.flip(-1)
        weight = weight / weight.mean()
        target, maps = features(model, pixels)
        if (
            rows[1] % 2
        ):  # the head must also read depth from the target alone: that is how stored targets become pictures
            maps = (F.pad(target, (0, 0, 1, 0)),) * LAYERS
        dense = (weight * (predict(model, maps).clamp(min=0.1).log() - truth).abs()).mean()
        read = F.pixel_shuffle(reader(target).mT.unflatten(-1, (8, 8)), 4)[:, 0]
        coarse = F.avg_pool2d(torch.stack([truth * weight, weight]).transpose(0, 1), 2)
        patch = (coarse[:, 1] * (read - coarse[:, 0] / coarse[:, 1]).abs()).mean()
        return dense + patch

    seconds = fit(
        "depth", [*model.parameters(), *reader.parameters()], loss, len(data.images), batch, steps, lr=1.2e-3, seed=seed
    )
    return model.eval(), seconds
