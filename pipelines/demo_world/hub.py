"""Folders as the hub lays them out: half-precision safetensors and the processors' JSON."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel


def save(model: PreTrainedModel, folder: Path) -> None:
    """Store in half precision; `model` itself goes on in float32 with exactly the stored values."""
    model.half().save_pretrained(folder)  # type: ignore[no-untyped-call]
    model.float()  # type: ignore[no-untyped-call]


def write_processor(folder: Path, content: dict[str, Any]) -> None:
    """``preprocessor_config.json``, in a folder that is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(content, indent=2) + "\n")


def processor(kind: str, size: int, resample: int, mean: list[float], std: list[float]) -> dict[str, Any]:
    """What every image processor says: squash to `size`, by PIL's `resample`, divide by 255, normalise."""
    return {
        "image_processor_type": kind,
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": resample,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }


def clip_processor(size: int, mean: list[float], std: list[float]) -> dict[str, Any]:
    """CLIP's own: shorter side, centre crop."""
    crop = {"do_center_crop": True, "crop_size": {"height": size, "width": size}, "do_convert_rgb": True}
    return {**processor("CLIPImageProcessor", size, 3, mean, std), **crop, "size": {"shortest_edge": size}}
