"""unCLIP's image encoder: CLIP's vision tower with its projection; the target is ``image_embeds``, not normalised."""

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from featurize.teachers import register
from featurize.teachers.base import Teacher
from olavlm.config import TeacherConfig


@register("unclip")
class UnClip(Teacher):
    """A diffusers repository with ``image_encoder`` and ``feature_extractor``, as stable-diffusion-2-1-unclip is."""

    model_class = CLIPVisionModelWithProjection
    weights_folder = "image_encoder"
    processor_folder = "feature_extractor"
    files = ("image_encoder/config.json", "image_encoder/model.safetensors", "feature_extractor/*")

    def __init__(self, config: TeacherConfig, device: str = "cpu"):
        super().__init__(config, device)
        if config.input_size != self.architecture.image_size:
            raise self.refuse("input_size", config.input_size, self.architecture.image_size)
        if config.grid != 1:
            raise self.refuse("grid", config.grid, "one pooled token (grid 1)")
        if config.width != self.architecture.projection_dim:
            raise self.refuse("width", config.width, self.architecture.projection_dim)
        if config.layers is not None:
            raise self.refuse("layers", config.layers, "no choice of layers (leave the key out)")

    def describe(self) -> dict[str, Any]:
        """See `Teacher.describe`."""
        return {"position_embedding": "as trained", "layers": None, "pooling": "image_embeds, not normalised"}

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """(n, 3, S, S) → (n, 1, width)."""
        embeds: Tensor = self.model(pixels.to(self.device, self.dtype)).image_embeds
        return embeds[:, None].float()
