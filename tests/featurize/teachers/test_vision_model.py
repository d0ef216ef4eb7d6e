"""Any vision model: what it gives, against the model called by hand; and the shipped example, in YAML only."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    AutoModel,
    BeitConfig,
    CLIPConfig,
    ConvNextConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    ResNetConfig,
    SamVisionConfig,
    SiglipConfig,
    SwinConfig,
    ViTConfig,
    ViTMAEConfig,
)

from featurize import teachers
from featurize.teachers.base import Teacher
from featurize.teachers.published import PUBLISHED
from featurize.teachers.vision_model import final_norm, pool
from olavlm.config import TeacherConfig, load_pipeline
from olavlm.errors import OlaError

Make = Callable[..., Teacher]
VIT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 64,
    "patch_size": 16,
}
TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CONFIGS = {
    "dinov2": Dinov2Config(**VIT),
    "registers": Dinov2WithRegistersConfig(**VIT),
    "dinov3": DINOv3ViTConfig(**VIT, num_register_tokens=4),
    "clip": CLIPConfig(vision_config=VIT, text_config=TEXT),
    "siglip": SiglipConfig(vision_config=VIT, text_config=TEXT),
    "vit": ViTConfig(**VIT),
    "beit": BeitConfig(**VIT),
    "sam": SamVisionConfig(**VIT),
    "vitmae": ViTMAEConfig(**VIT),
    "swin": SwinConfig(embed_dim=4, depths=[1, 1, 1], num_heads=[1, 1, 2], window_size=4, image_size=64),
    "convnext": ConvNextConfig(hidden_sizes=[4, 8, 16], depths=[1, 1, 1], num_stages=3, image_size=64),
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[4, 8, 16], depths=[1, 1, 1]),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model by its name here."""
    folder = tmp_path_factory.mktemp("vision")

    def save(name: str) -> Path:
        if not (folder / name).exists():
            torch.manual_seed(0)
            AutoModel.from_config(CONFIGS[name]).save_pretrained(folder / name)
            statistics = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
            (folder / name / "preprocessor_config.json").write_text(json.dumps(statistics))
        return folder / name

    return save


@pytest.fixture
def make(saved: Callable[[str], Path]) -> Make:
    def load(name: str, **stated: object) -> Teacher:
        defaults = {"teacher": "vision_model", "weights": str(saved(name)), "input_size": 64, "grid": 4, "width": 16}
        return teachers.load(TeacherConfig(**{**defaults, **stated}))

    return load


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


# ---- what the target is


@pytest.mark.parametrize(
    ("name", "prefix"), [("dinov2", 1), ("registers", 5), ("dinov3", 5), ("siglip", 0), ("vit", 1)]
)
def test_the_last_block_is_the_models_own_last_hidden_state(
    make: Make, saved: Callable[[str], Path], pixels: torch.Tensor, name: str, prefix: int
) -> None:
    whole: Any = AutoModel.from_pretrained(saved(name)).eval()
    whole = getattr(whole, "vision_model", whole)
    with torch.inference_mode():
        expected = whole(pixel_values=pixels).last_hidden_state[:, prefix:]
    torch.testing.assert_close(make(name).encode(pixels), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["dinov2", "registers", "clip", "siglip"])
def test_several_layers_are_the_mean_of_their_normed_tokens(
    make: Make, saved: Callable[[str], Path], pixels: torch.Tensor, name: str
) -> None:
    whole: Any = AutoModel.from_pretrained(saved(name)).eval()
    whole = getattr(whole, "vision_model", whole)
    with torch.inference_mode():
        hidden = whole(pixel_values=pixels, output_hidden_states=True).hidden_states  # 0 is the embedding
        norm = final_norm(whole, 16)[1]
        expected = (norm(hidden[1]) + norm(hidden[2]))[:, -16:] / 2
    torch.testing.assert_close(make(name, layers=[0, 1]).encode(pixels), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["swin", "convnext", "resnet"])
def test_convolutional_and_hierarchical_backbones_give_their_map(
    make: Make, saved: Callable[[str], Path], pixels: torch.Tensor, name: str
) -> None:
    whole = AutoModel.from_pretrained(saved(name)).eval()
    with torch.inference_mode():
        expected = whole(pixel_values=pixels).last_hidden_state
        if name == "convnext":
            expected = whole.layernorm(expected.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if expected.ndim == 4:
            expected = expected.flatten(2).transpose(1, 2)
    torch.testing.assert_close(make(name).encode(pixels), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["dinov2", "clip", "siglip", "swin", "convnext", "resnet"])
def test_grid_1_is_the_pooled_output_and_with_layers_their_mean(
    make: Make, saved: Callable[[str], Path], pixels: torch.Tensor, name: str
) -> None:
    whole: Any = AutoModel.from_pretrained(saved(name)).eval()
    whole = getattr(whole, "vision_model", whole)
    with torch.inference_mode():
        expected = whole(pixel_values=pixels).pooler_output.flatten(1)[:, None]
    pooled = make(name, grid=1)
    assert pooled.describe()["layers"] is None
    torch.testing.assert_close(pooled.encode(pixels), expected, atol=1e-5, rtol=0)
    mean = make(name, layers=[2]).encode(pixels).mean(1, keepdim=True)
    torch.testing.assert_close(make(name, grid=1, layers=[2]).encode(pixels), mean, atol=1e-5, rtol=0)


@given(side=st.integers(1, 8), grid=st.integers(1, 16), constant=st.floats(-10, 10))
def test_pooling_keeps_constants_and_averages_exactly(side: int, grid: int, constant: float) -> None:
    maps = torch.full((1, 2, side, side), constant)
    torch.testing.assert_close(pool(maps, grid), torch.full((1, 2, grid, grid), constant))
    noise = torch.randn(1, 2, side * grid, side * grid, generator=torch.Generator().manual_seed(side))
    blocks = noise.unfold(2, side, side).unfold(3, side, side).mean((-1, -2))
    torch.testing.assert_close(pool(noise, grid), blocks, atol=1e-5, rtol=1e-5)
    finer = F.interpolate(noise, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(pool(noise, 2 * side * grid), finer)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["dinov2", "dinov3", "siglip", "swin", "convnext", "resnet"])
def test_low_precision_stays_close(make: Make, pixels: torch.Tensor, name: str, dtype: str) -> None:
    full, low = make(name).encode(pixels), make(name, dtype=dtype).encode(pixels)
    assert low.dtype == torch.float32
    assert torch.cosine_similarity(full.flatten(), low.flatten(), dim=0) > 0.999


def test_a_target_does_not_depend_on_its_neighbours_in_the_batch(make: Make, pixels: torch.Tensor) -> None:
    teacher = make("dinov2", layers=[0, 2], grid=3)
    nothing = torch.zeros_like(pixels[0])
    full = teacher.encode(torch.stack([pixels[0], pixels[1], pixels[0]]))
    assert torch.equal(full[0], full[2])
    assert torch.equal(full[:2], teacher.encode(torch.stack([pixels[0], pixels[1], nothing]))[:2])


def test_promise_1_key_checked_threads_that_share_a_network_get_their_own_features(
    make: Make, pixels: torch.Tensor
) -> None:
    """As the in-process executor's lanes do: none begins before all have, and none ends before all are through."""
    teacher = make("dinov2", layers=[0, 2])
    expected = [teacher.encode(image[None]) for image in pixels]
    barrier = threading.Barrier(2)

    def together(*_: object) -> None:
        barrier.wait(60)

    teacher.model.register_forward_pre_hook(together)
    teacher.model.register_forward_hook(together)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(teacher.encode, [image[None] for image in pixels]))
    assert all(map(torch.equal, found, expected))


def test_blocks_behind_the_last_layer_are_not_kept(make: Make) -> None:
    count = [sum(p.numel() for p in make("dinov2", layers=[layer]).model.parameters()) for layer in (0, 1, 2)]
    assert count[2] - count[1] == count[1] - count[0] > 0


# ---- another input size


@pytest.mark.parametrize("name", ["dinov2", "dinov3", "clip", "siglip", "vit", "beit", "swin", "convnext", "resnet"])
def test_another_input_size_goes_by_the_models_own_rule(make: Make, name: str) -> None:
    teacher = make(name, input_size=96, grid=9)
    pixels = torch.randn(1, 3, 96, 96)
    assert teacher.encode(pixels).shape == (1, 81, 16)
    described = teacher.describe()
    assert described["pooling"].endswith("prefix tokens dropped, 6x6 to 9x9 bilinear")
    if name != "resnet":  # which is of no size
        assert described["position_embedding"] == "the model's own rule, from 64 to 96 pixels"


def test_identity_says_what_was_done(make: Make) -> None:
    identity = make("registers", layers=[0, 2], grid=2).identity("dino")
    assert identity.layers == (0, 2)
    assert identity.position_embedding == "as trained"
    assert identity.pooling == (
        "mean over layers of the tokens after layernorm, 5 prefix tokens dropped, 4x4 to 2x2 by area"
    )
    assert make("beit").identity("x").pooling.startswith("mean over layers of the tokens as they are, 1 prefix")


# ---- what is refused


@pytest.mark.parametrize(
    ("name", "stated", "message"),
    [
        ("dinov2", {"width": 17}, "width is 17, the network gives 16"),
        ("dinov2", {"layers": [3]}, r"layers is \[3\], the network gives blocks 0 to 2"),
        ("dinov2", {"layers": [-1]}, "blocks 0 to 2"),
        ("dinov2", {"layers": []}, "blocks 0 to 2"),
        ("swin", {"layers": [0, 2]}, "width is 16, the network gives 8 and 16"),
        ("sam", {"input_size": 96}, r"input_size is 96, the network gives no features for it: .*doesn't match model"),
        ("sam", {"grid": 1}, "the model has no pooled output; with `layers` their mean over the image is taken"),
        ("vitmae", {}, "5 tokens for 4x4 patches"),  # it hides three quarters of the image, at random
    ],
)
def test_what_a_network_cannot_give_is_refused(make: Make, name: str, stated: dict[str, Any], message: str) -> None:
    with pytest.raises(OlaError, match=message):
        make(name, **stated)


# ---- the shipped example


def test_the_shipped_example_needs_no_code(tmp_path: Path) -> None:
    """`llava558k-dino-siglip` as it is, but for smaller networks in folders of the hub's layout and keys."""
    smaller = {"num_hidden_layers": 27, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    overrides = ["student.tasks=[dino]"]
    for task, weights in (
        ("dino", "facebook/dinov2-large"),
        ("siglip", "google/siglip-so400m-patch14-384"),
        ("siglip_pooled", "google/siglip-so400m-patch14-384"),
    ):
        folder = tmp_path / task
        folder.mkdir()
        config = json.loads(json.dumps(PUBLISHED[weights]["config.json"]))
        for part in [config] if task == "dino" else [config["text_config"], config["vision_config"]]:
            part.update(smaller)
        AutoModel.from_config(Dinov2Config(**config) if task == "dino" else SiglipConfig(**config)).save_pretrained(
            folder
        )
        (folder / "preprocessor_config.json").write_text(json.dumps(PUBLISHED[weights]["preprocessor_config.json"]))
        overrides += [
            f"teachers.{task}.weights={folder}",
            f"teachers.{task}.width=16",
            f"teachers.{task}.dtype=float32",
        ]
    pipeline = load_pipeline("llava558k-dino-siglip", [*overrides, "student.layers={dino: [3]}", "stages={}"])
    photograph = Image.linear_gradient("L").convert("RGB").resize((80, 50))
    for task, tokens in (("dino", 576), ("siglip", 144), ("siglip_pooled", 1)):
        teacher = teachers.load(pipeline.teachers[task])
        features = teacher.encode(teacher.preprocess(photograph)[None])
        assert features.shape == (1, tokens, 16)
        assert features.isfinite().all()
    assert teachers.load(pipeline.teachers["siglip"]).describe()["pooling"].endswith("27x27 to 12x12 by area")
