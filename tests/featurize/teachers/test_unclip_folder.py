"""The unCLIP teacher on a folder that diffusers itself wrote, against diffusers' own pipeline."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection

from featurize import teachers
from olavlm.config import TeacherConfig

SIZE, WIDTH = 32, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny `StableUnCLIPImg2ImgPipeline`, saved."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    base = tmp_path_factory.mktemp("unclip")
    torch.manual_seed(0)
    (base / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}))
    (base / "merges.txt").write_text("#version: 0.2\n")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    channels = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8]}
    square = {"height": SIZE, "width": SIZE}
    pipeline = diffusers.StableUnCLIPImg2ImgPipeline(
        feature_extractor=CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=square),
        image_encoder=CLIPVisionModelWithProjection(
            CLIPVisionConfig(**small, image_size=SIZE, patch_size=8, projection_dim=WIDTH)
        ),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=WIDTH),
        image_noising_scheduler=diffusers.DDPMScheduler(),
        tokenizer=CLIPTokenizer(str(base / "vocab.json"), str(base / "merges.txt")),
        text_encoder=CLIPTextModel(CLIPTextConfig(**small, vocab_size=3, bos_token_id=0, eos_token_id=1)),
        unet=diffusers.UNet2DConditionModel(**channels, norm_num_groups=4, layers_per_block=1, cross_attention_dim=16),
        scheduler=diffusers.DDIMScheduler(),
        vae=diffusers.AutoencoderKL(
            block_out_channels=[8], norm_num_groups=4, down_block_types=["DownEncoderBlock2D"],
            up_block_types=["UpDecoderBlock2D"],
        ),
    )  # fmt: skip
    pipeline.save_pretrained(base / "saved")
    return base / "saved"


def test_a_folder_that_diffusers_saved_gives_its_image_embeds(folder: Path) -> None:
    """The layout and the numbers of `StableUnCLIPImg2ImgPipeline`, for an image that its processor need not crop."""
    import diffusers

    assert {"model_index.json", "image_encoder", "feature_extractor", "unet"} <= {p.name for p in folder.iterdir()}
    image = Image.radial_gradient("L").convert("RGB").resize((50, 50))
    config = TeacherConfig(teacher="unclip", weights=str(folder), input_size=SIZE, grid=1, width=WIDTH)
    teacher = teachers.load(config)
    features = teacher.encode(teacher.preprocess(image)[None])
    pipeline = diffusers.StableUnCLIPImg2ImgPipeline.from_pretrained(folder)
    pixels = pipeline.feature_extractor(images=image, return_tensors="pt").pixel_values
    with torch.inference_mode():
        expected = pipeline.image_encoder(pixels).image_embeds
    torch.testing.assert_close(features[:, 0], expected, atol=1e-4, rtol=0)
