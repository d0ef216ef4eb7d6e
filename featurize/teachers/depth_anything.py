"""Depth Anything: a DINOv2 backbone under a DPT head; the target is a mean of normalised backbone features.

Published rule (OLA-VLM): mean of the final-norm'ed outputs of four blocks (4, 11, 17, 23 of 24, counted from 0),
without the CLS token.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DepthAnythingForDepthEstimation

from featurize.teachers import register
from featurize.teachers.base import Teacher
from olavlm.config import TeacherConfig


@register("depth_anything")
class DepthAnything(Teacher):
    """Any checkpoint of transformers' `DepthAnythingForDepthEstimation` with a Dinov2 backbone."""

    model_class = DepthAnythingForDepthEstimation

    def __init__(self, config: TeacherConfig, device: str = "cpu"):
        super().__init__(config, device)
        metric = self.architecture.depth_estimation_type == "metric"
        self.depth_sign = "larger_is_farther" if metric else "larger_is_closer"  # relative models predict disparity
        self.depth_unit = "m" if metric else None
        backbone = self.architecture.backbone_config
        taps = backbone.out_indices  # 1-based: 0 is the embedding
        self.layers = tuple(config.layers if config.layers is not None else (tap - 1 for tap in taps))
        if config.grid * backbone.patch_size != config.input_size:
            raise self.refuse("grid", config.grid, f"input_size {config.input_size} / patch {backbone.patch_size}")
        if config.width != backbone.hidden_size:
            raise self.refuse("width", config.width, backbone.hidden_size)
        if not self.layers or not all(0 <= layer < backbone.num_hidden_layers for layer in self.layers):
            raise self.refuse("layers", list(self.layers), f"blocks 0 to {backbone.num_hidden_layers - 1}")

    def describe(self) -> dict[str, Any]:
        """See `Teacher.describe`."""
        return {
            "position_embedding": f"bicubic to {self.config.grid}x{self.config.grid}, scale offset 0.1, once",
            "layers": self.layers,
            "pooling": "mean over layers of the final-norm'ed tokens, CLS dropped",
        }

    def load_model(self) -> nn.Module:
        """The whole network, its position embeddings resized once to the grid."""
        model: Any = self.from_pretrained()
        embeddings = model.backbone.embeddings
        embeddings.position_embeddings = nn.Parameter(
            resize_positions(embeddings.position_embeddings.data.float(), self.config.grid)
        )
        network: nn.Module = model
        return network

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """(n, 3, S, S) → (n, grid², width), row-major."""
        backbone: Any = self.model.backbone
        hidden = backbone.embeddings(pixels.to(self.device, self.dtype))
        total = torch.zeros((), device=self.device)
        for i, block in enumerate(backbone.encoder.layer[: max(self.layers) + 1]):
            hidden = block(hidden)
            if i in self.layers:
                total = total + backbone.layernorm(hidden)[:, 1:].float()
        return total / len(self.layers)

    @torch.inference_mode()
    def decode(self, features: Tensor) -> Tensor:
        """Depth (n, S, S) float32 by the model's own neck and head; the mean feature stands in for each of its taps."""
        model: Any = self.model
        features = features.to(self.device, self.dtype)
        with_cls = torch.cat([features.mean(1, keepdim=True), features], dim=1)  # the neck drops the first token
        grid = self.config.grid
        taps = [with_cls] * len(model.config.neck_hidden_sizes)
        depth: Tensor = model.head(model.neck(taps, grid, grid), grid, grid)
        return depth.float()


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """DINOv2's rule: position embeddings (1, 1 + g², width) resized to (1, 1 + grid², width).

    Bicubic by the scale factor ``(grid + 0.1) / g``, not by the target size: the offset shifts every sample and is part
    of what the network was run with (facebookresearch/dinov2, ``interpolate_pos_encoding``).
    """
    cls, patches = positions[:, :1], positions[:, 1:]
    side = round(patches.shape[1] ** 0.5)
    if side == grid:
        return positions
    scale = (grid + 0.1) / side
    square = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(square, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([cls, resized.permute(0, 2, 3, 1).reshape(1, grid * grid, -1)], dim=1)
