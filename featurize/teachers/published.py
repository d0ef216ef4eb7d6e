"""The published teachers as the hub describes them: configurations without weights, in the hub's layouts and keys.

What a teacher costs can be measured before anything is downloaded, and the full sizes can be tried with random weights.
"""

import json
from pathlib import Path
from typing import Any

import transformers

from olavlm.errors import OlaError

_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "rescale_factor": 1 / 255}
_CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "rescale_factor": 1 / 255}


def _depth_anything(
    width: int, heads: int, taps: list[int], neck: list[int], fusion: int, **more: int
) -> dict[str, Any]:
    return {
        "config.json": {
            "architectures": ["DepthAnythingForDepthEstimation"],
            "model_type": "depth_anything",
            "backbone": None,
            "backbone_config": {
                "architectures": ["Dinov2Model"],
                "model_type": "dinov2",
                "hidden_size": width,
                "image_size": 518,
                "num_attention_heads": heads,
                "out_features": [f"stage{tap}" for tap in taps],
                "out_indices": taps,
                "patch_size": 14,
                "reshape_hidden_states": False,
                **more,  # the hub's files leave out what is Dinov2's default
            },
            "fusion_hidden_size": fusion,
            "head_hidden_size": 32,
            "head_in_index": -1,
            "neck_hidden_sizes": neck,
            "patch_size": 14,
            "reassemble_factors": [4, 2, 1, 0.5],
            "reassemble_hidden_size": width,
            "use_pretrained_backbone": False,
        },
        "preprocessor_config.json": {**_IMAGENET, "size": {"height": 518, "width": 518}},
    }


def _oneformer(backbone: dict[str, Any]) -> dict[str, Any]:
    stages = [f"stage{i}" for i in range(1, 5)]
    return {
        "config.json": {
            "architectures": ["OneFormerForUniversalSegmentation"],
            "model_type": "oneformer",
            "backbone_config": {"model_type": "swin", "drop_path_rate": 0.3, "out_features": stages, **backbone},
        },
        "preprocessor_config.json": {**_IMAGENET, "size": {"shortest_edge": 800, "longest_edge": 1333}},
    }


#: By hub id: the JSON files of the repository.
PUBLISHED: dict[str, dict[str, Any]] = {
    "depth-anything/Depth-Anything-V2-Small-hf": _depth_anything(384, 6, [3, 6, 9, 12], [48, 96, 192, 384], 64),
    "depth-anything/Depth-Anything-V2-Base-hf": _depth_anything(768, 12, [3, 6, 9, 12], [96, 192, 384, 768], 128),
    "depth-anything/Depth-Anything-V2-Large-hf": _depth_anything(
        1024, 16, [5, 12, 18, 24], [256, 512, 1024, 1024], 256, num_hidden_layers=24
    ),
    "shi-labs/oneformer_coco_swin_large": _oneformer(
        {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], "window_size": 12}
    ),
    "shi-labs/oneformer_ade20k_swin_tiny": _oneformer(
        {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
    ),
    "stabilityai/stable-diffusion-2-1-unclip": {
        "image_encoder/config.json": {
            "architectures": ["CLIPVisionModelWithProjection"],
            "model_type": "clip_vision_model",
            "hidden_act": "gelu",
            "hidden_size": 1280,
            "image_size": 224,
            "intermediate_size": 5120,
            "num_attention_heads": 16,
            "num_hidden_layers": 32,
            "patch_size": 14,
            "projection_dim": 1024,
        },
        "feature_extractor/preprocessor_config.json": {**_CLIP, "size": {"shortest_edge": 224}},
    },
    "facebook/dinov2-large": {
        "config.json": {
            "architectures": ["Dinov2Model"],
            "model_type": "dinov2",
            "hidden_size": 1024,
            "image_size": 518,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
        },
        "preprocessor_config.json": {**_IMAGENET, "size": {"shortest_edge": 256}},
    },
    "google/siglip-so400m-patch14-384": {
        "config.json": {
            "architectures": ["SiglipModel"],
            "model_type": "siglip",
            "text_config": {
                "model_type": "siglip_text_model",
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_attention_heads": 16,
                "num_hidden_layers": 27,
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 1152,
                "image_size": 384,
                "intermediate_size": 4304,
                "num_attention_heads": 16,
                "num_hidden_layers": 27,
                "patch_size": 14,
            },
        },
        "preprocessor_config.json": {**_HALF, "size": {"height": 384, "width": 384}},
    },
}


def write_random(weights: str, folder: Path) -> None:
    """A repository of the hub with random weights; what it computes means nothing, what it costs is right.

    Args:
        weights: a hub id of `PUBLISHED`.
        folder: is made, and gets the repository's files.

    Raises:
        OlaError: no configuration of that id is known.
    """
    if weights not in PUBLISHED:
        raise OlaError(f"weights {weights!r}: no configuration is known here; known: {', '.join(PUBLISHED)}")
    for name, content in PUBLISHED[weights].items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.name == "config.json":
            network = getattr(transformers, content["architectures"][0])
            network(network.config_class.from_dict(content)).save_pretrained(file.parent)
        file.write_text(json.dumps(content))
