"""OneFormer with a Swin backbone: the target is the backbone's last stage after its LayerNorm, resized to the grid."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import AutoTokenizer, OneFormerForUniversalSegmentation

from featurize.teachers import register
from featurize.teachers.base import Teacher
from olavlm.config import TeacherConfig


@register("oneformer")
class OneFormer(Teacher):
    """Any checkpoint of transformers' `OneFormerForUniversalSegmentation` with a Swin backbone."""

    model_class = OneFormerForUniversalSegmentation

    def __init__(self, config: TeacherConfig, device: str = "cpu"):
        super().__init__(config, device)
        backbone = self.architecture.backbone_config
        width = backbone.embed_dim * 2 ** (len(backbone.depths) - 1)
        if config.width != width:
            raise self.refuse("width", config.width, width)
        if config.layers is not None:
            raise self.refuse("layers", config.layers, "the last stage only (leave the key out)")

    @property
    def sizes(self) -> list[tuple[int, Image.Resampling]]:
        """The view's size (published: 768), then the processor's own shorter side (published: 800), bilinear."""
        size = self.processor.get("size", 800)
        own = size if isinstance(size, int) else size.get("shortest_edge", size.get("height"))
        further = [(own, Image.Resampling.BILINEAR)] if own != self.config.input_size else []
        return [*super().sizes, *further]

    def describe(self) -> dict[str, Any]:
        """See `Teacher.describe`."""
        grid = self.config.grid
        return {
            "position_embedding": "relative, as trained",
            "layers": None,
            "pooling": f"last stage after its LayerNorm, bilinear (align_corners=False) to {grid}x{grid}",
        }

    @property
    def labels(self) -> dict[int, str]:
        """The classes the checkpoint was trained on."""
        return {int(label): str(name) for label, name in self.architecture.id2label.items()}

    def load_model(self) -> nn.Module:
        """The whole network; encoding runs its backbone only."""
        return self.from_pretrained(unused=("criterion.",))  # the loss

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """(n, 3, S, S) → (n, grid², width), row-major."""
        last = self._pixel_level.encoder(pixels.to(self.device, self.dtype)).feature_maps[-1].float()
        resized = interpolate(last, size=(self.config.grid,) * 2, mode="bilinear", align_corners=False)
        return resized.flatten(2).transpose(1, 2)

    @torch.inference_mode()
    def decode(self, features: Tensor) -> Tensor:
        """Semantic labels (n, S/4, S/4) int64 by the model's own decoders, from the last stage alone.

        The finer stages are not stored; each is given the value its LayerNorm takes on a featureless input, so that
        what is seen comes from the target only and is as coarse as the target.
        """
        encoder = self._pixel_level.encoder
        n, grid = len(features), self.config.grid
        stem = self.architecture.backbone_config.patch_size
        side = self.sizes[-1][0] // stem
        stages = len(encoder.channels)
        maps = []
        for i, stage in enumerate(encoder.out_features):
            shape = (n, encoder.channels[i], side // 2**i, side // 2**i)
            maps.append(encoder.hidden_states_norms[stage].bias.view(1, -1, 1, 1).expand(shape))
        square = features.to(self.device, self.dtype).transpose(1, 2).reshape(n, -1, grid, grid)
        maps[-1] = interpolate(square, size=(side // 2 ** (stages - 1),) * 2, mode="bilinear", align_corners=False)
        pixel = self._pixel_level.decoder(maps)
        task: Any = self.model.model
        output = task.transformer_module(
            multi_scale_features=pixel.multi_scale_features,
            mask_features=pixel.mask_features,
            task_token=task.task_encoder(self._task_tokens().expand(n, -1)),
        )
        classes = output.prediction_class.softmax(-1)[..., :-1]  # the last class is "no object"
        return torch.einsum("nqc,nqhw->nchw", classes.float(), output.prediction_masks.float().sigmoid()).argmax(1)

    @property
    def _pixel_level(self) -> Any:
        return self.model.model.pixel_level_module  # type: ignore[union-attr]

    def _task_tokens(self) -> Tensor:
        """The tokens of OneFormer's task prompt, as its processor makes them: ids, zero where padded."""
        tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        length = self.architecture.task_seq_len
        encoded = tokenizer("the task is semantic", padding="max_length", max_length=length, truncation=True)
        ids = torch.tensor([encoded["input_ids"]]) * torch.tensor([encoded["attention_mask"]])
        return ids.to(self.device, self.dtype)
