"""Any vision model of transformers, these layers, pooled to this grid: another teacher without another line of code.

    dino:
      teacher: vision_model
      weights: facebook/dinov2-large
      layers: [11, 17, 23]  # blocks or stages from 0; default: the last
      input_size: 336
      grid: 24
      width: 1024

The target is the mean over the layers of the features behind them, each after the model's final norm (as Depth Anything
does: blocks differ in scale, and their raw outliers are hard to predict and to quantize), without prefix tokens (CLS,
registers), averaged to a coarser grid or interpolated to a finer one. With grid 1 and no layers it is the model's own
pooled output. Of a dual model (CLIP, SigLIP) the vision tower is taken.
"""

import inspect
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate
from transformers import MODEL_MAPPING

from featurize.teachers import register
from featurize.teachers.base import Teacher
from olavlm.config import TeacherConfig


@register("vision_model")
class VisionModel(Teacher):
    """What `AutoModel` loads and takes ``pixel_values`` alone: ViTs, DINO, CLIP, SigLIP, Swin, ConvNeXt, ResNet …"""

    def __init__(self, config: TeacherConfig, device: str = "cpu"):
        super().__init__(config, device)
        self.architecture = getattr(self.architecture, "vision_config", self.architecture)
        if type(self.architecture) not in MODEL_MAPPING:
            raise self.refuse("the model", self.architecture.model_type, "no features; expected a vision model")
        self.model_class = MODEL_MAPPING[type(self.architecture)]
        self.pooled = config.grid == 1 and config.layers is None
        with torch.device("meta"):  # its shapes are known without its weights
            model = self.model_class(self.architecture).eval()
        depth = len(blocks(model))
        self.layers: tuple[int, ...] = () if self.pooled else tuple(config.layers or [depth - 1])
        if config.layers == [] or not all(0 <= layer < depth for layer in self.layers):
            raise self.refuse("layers", config.layers, f"blocks 0 to {depth - 1}")
        trained = getattr(self.architecture, "image_size", None)
        self.trained_size = trained[0] if isinstance(trained, list | tuple) else trained
        self.norm = ""
        self.prefix = self.side = 0
        try:
            widths = {feature.shape[-1] for feature in self._features(model, self._blank())}
        except Exception as error:  # whatever the model's own code raises
            reason = str(error).partition("\n")[0]
            raise self.refuse("input_size", config.input_size, f"no features for it: {reason}") from None
        if widths != {config.width}:
            raise self.refuse("width", config.width, " and ".join(map(str, sorted(widths))))

    def describe(self) -> dict[str, Any]:
        """See `Teacher.describe`."""
        size, grid = self.config.input_size, self.config.grid
        moved = self.trained_size not in (None, size)
        positions = f"the model's own rule, from {self.trained_size} to {size} pixels" if moved else "as trained"
        if self.pooled:
            pooling = "the model's pooled output"
        else:
            how = "as it is" if grid == self.side else "by area" if grid < self.side else "bilinear"
            norm = f"after {self.norm}" if self.norm else "as they are"
            pooling = (
                f"mean over layers of the tokens {norm}, {self.prefix} prefix tokens dropped, "
                f"{self.side}x{self.side} to {grid}x{grid} {how}"
            )
        return {"position_embedding": positions, "layers": self.layers or None, "pooling": pooling}

    def load_model(self) -> nn.Module:
        """The network, or the vision tower of a dual one, without the blocks behind the last that is asked for."""
        model = self.from_pretrained(unused=() if self.pooled else ("pooler.", "head."))
        if self.layers and not self._hierarchical:
            del blocks(model)[max(self.layers) + 1 :]
        return model

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """(n, 3, S, S) → (n, grid², width), row-major."""
        features = self._features(self.model, pixels.to(self.device, self.dtype))
        return torch.stack(features).mean(0)

    @property
    def _hierarchical(self) -> bool:
        """Whether the model has stages of falling resolution, not blocks that are all alike."""
        return hasattr(self.architecture, "depths")

    def _blank(self) -> Tensor:
        size = self.config.input_size
        return torch.empty(1, 3, size, size, device="meta")

    def _features(self, model: nn.Module, pixels: Tensor) -> list[Tensor]:
        """The features of each layer asked for, or the pooled output: (n, grid², width) float32 each."""
        found: dict[int, Any] = {}
        here = get_ident()

        def keep(layer: int) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                if get_ident() == here:  # else it is another image's: lanes share the network, and so all hooks on it
                    found[layer] = output

            return hook

        hooks = [blocks(model)[layer].register_forward_hook(keep(layer)) for layer in self.layers]
        options = {}
        if self.config.input_size != self.trained_size:
            takes = inspect.signature(model.forward).parameters
            options = {name: True for name in ("interpolate_pos_encoding",) if name in takes}
        try:
            output = model(pixel_values=pixels, **options)
        finally:
            for hook in hooks:
                hook.remove()
        if self.pooled:
            pooler_output = getattr(output, "pooler_output", None)
            if pooler_output is None:
                raise ValueError("the model has no pooled output; with `layers` their mean over the image is taken")
            return [pooler_output.flatten(1)[:, None].float()]
        outputs = (found[layer] for layer in self.layers)
        return [self._to_grid(model, out[0] if isinstance(out, tuple) else out) for out in outputs]

    def _to_grid(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """A layer's output, tokens (n, prefix + side², width) or a map (n, width, side, side), as (n, grid², width)."""
        if hidden.ndim == 4:
            square = hidden.permute(0, 2, 3, 1)
        else:
            if self._hierarchical:
                side = round(hidden.shape[1] ** 0.5)
            else:
                patch = self.architecture.patch_size
                side = self.config.input_size // (patch if isinstance(patch, int) else patch[0])
            self.prefix = hidden.shape[1] - side * side
            if self.prefix < 0:
                raise ValueError(f"{hidden.shape[1]} tokens for {side}x{side} patches")
            square = hidden[:, self.prefix :].reshape(len(hidden), side, side, -1)
        self.side = square.shape[1]
        self.norm, norm = final_norm(model, square.shape[-1])
        maps = pool(norm(square).float().permute(0, 3, 1, 2), self.config.grid)
        return maps.flatten(2).transpose(1, 2)


def blocks(model: nn.Module) -> nn.ModuleList:
    """A network's blocks or stages: in every encoder of transformers the first and outermost list of modules."""
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def final_norm(model: nn.Module, width: int) -> tuple[str, nn.Module]:
    """Name and module of the norm that a network ends with, if it is one of that width; else an identity, no name."""
    for name, module in reversed(list(model.named_children())):
        weight = getattr(module, "weight", None)
        if type(module).__name__.lower().endswith("norm") and weight is not None and weight.shape == (width,):
            return name, module
    return "", nn.Identity()


def pool(maps: Tensor, grid: int) -> Tensor:
    """Feature maps (n, width, side, side) on another grid: area averages if it is coarser, bilinear if it is finer."""
    side = maps.shape[-1]
    if grid <= side:
        return maps if grid == side else adaptive_avg_pool2d(maps, grid)
    return interpolate(maps, size=(grid, grid), mode="bilinear", align_corners=False)
