"""Vision towers as the hub has them: CLIP, SigLIP and SigLIP 2 at a fixed resolution, and their image tokens."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel

from olavlm.errors import OlaError
from olavlm.model import build_student
from olavlm.model.configuration import check_image_tokens, image_tokens

Config = dict[str, Any]

#: config.json of these repositories of the hub; they leave out what has CLIP's or SigLIP's default.
HUB: dict[str, Config] = json.loads((Path(__file__).parents[2] / "data" / "hub_configs.json").read_text())
TASKS = [{"name": "depth", "kind": "dense", "queries": 16, "width": 20, "layers": [1, 3], "task_tokens": 4}]


def write_json(file: Path, content: Config) -> None:
    file.write_text(json.dumps(content, indent=2))


CLIP_PREPROCESSING: Config = {
    "crop_size": 56,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 56,
}
SIGLIP_PREPROCESSING: Config = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "SiglipProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 62, "width": 62},
}


@dataclass(frozen=True)
class Tower:
    """A tower of the hub, and its size here."""

    hub: str
    image_size: int
    tokens: int
    front: int  # tokens before the patches
    preprocessing: Config
    own_tokens: int  # at full size


TOWERS = {  # 62 = 4·14 + 6: a rest that no patch covers, as 384 has one
    "clip": Tower("openai/clip-vit-large-patch14-336", 56, 16, 1, CLIP_PREPROCESSING, 576),
    "siglip": Tower("google/siglip-so400m-patch14-384", 62, 16, 0, SIGLIP_PREPROCESSING, 729),
    "siglip-2": Tower("google/siglip2-so400m-patch14-384", 62, 16, 0, SIGLIP_PREPROCESSING, 729),
}


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("whole", [True, False], ids=["dual", "vision"])
@torch.no_grad()
def test_towers(
    kind: str, whole: bool, make_language_model: Callable[..., str], images: list[Image.Image], tmp_path: Path
) -> None:
    """From the hub's folder of the dual model, or its vision part alone."""
    tower = TOWERS[kind]
    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3}
    config = deepcopy(HUB[tower.hub])
    config["text_config"] |= small | {"vocab_size": 40}
    config["vision_config"] |= small | {"image_size": tower.image_size}
    write_json(tmp_path / "config.json", config if whole else config["vision_config"])
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.from_pretrained(tmp_path)).save_pretrained(tmp_path)
    write_json(tmp_path / "config.json", config if whole else config["vision_config"])
    weights = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith("text_model.") for name in weights) is whole
    # The hub's files hold a buffer that has become none since.
    weights["vision_model.embeddings.position_ids"] = torch.arange(tower.tokens + tower.front)[None]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    write_json(tmp_path / "preprocessor_config.json", tower.preprocessing)

    model, processor = build_student(str(tmp_path), make_language_model(), TASKS)
    assert model.config.image_seq_length == processor.image_seq_length == tower.tokens
    check_image_tokens(model.config)
    pixels = processor.pixel_values(images)
    assert pixels.shape == (3, 3, tower.image_size, tower.image_size)
    its = AutoModel.from_pretrained(tmp_path)
    its = its.vision_model if whole else its
    hidden = its(pixels, output_hidden_states=True).hidden_states[-2]
    assert hidden.shape == (3, tower.tokens + tower.front, 16)
    expected = model.model.multi_modal_projector(hidden[:, tower.front :])
    assert_close(model.image_features(pixels), expected)
    inputs = processor(images=images, text=["<image> what", "<image> <image> a cube"])
    assert model(**inputs, predict=True).predictions["depth"][3].shape == (3, 16, 20)


@pytest.mark.parametrize("kind", TOWERS)
def test_image_tokens_at_full_size(kind: str, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", HUB[TOWERS[kind].hub])
    vision = AutoConfig.from_pretrained(tmp_path).vision_config
    assert image_tokens(vision) == {
        "vision_feature_select_strategy": "default" if TOWERS[kind].front else "full",
        "image_seq_length": TOWERS[kind].own_tokens,
    }


def test_image_tokens_that_do_not_fit_are_refused(
    make_language_model: Callable[..., str], tower: str, images: list[Image.Image]
) -> None:
    model, processor = build_student(tower, make_language_model(), TASKS)
    pixels = processor.pixel_values(images[:1])
    for key, value, message in (
        ("image_seq_length", 9, r"image_seq_length: 9; expected 16 for a clip_vision_model with images of 32"),
        ("vision_feature_select_strategy", "full", r"vision_feature_select_strategy: 'full'; expected 'default'"),
    ):
        wrong = deepcopy(model)
        setattr(wrong.config, key, value)
        with pytest.raises(OlaError, match=message):
            check_image_tokens(wrong.config)
        ids = torch.tensor([[1, *wrong.config.image_block, 5]])  # whole blocks, as the configuration has them
        with pytest.raises(OlaError, match=r"image features: 1[67] tokens per image; image_seq_length says"):
            wrong(input_ids=ids, pixel_values=pixels)
