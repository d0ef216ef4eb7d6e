import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

from featurize import teachers
from featurize.teachers.base import Teacher, weights_hash
from featurize.teachers.depth_anything import resize_positions
from olavlm.config import TeacherConfig
from olavlm.errors import OlaError

DATA = Path(__file__).resolve().parents[2] / "data"
Make = Callable[..., Teacher]


@pytest.fixture
def make(weights: Path) -> Make:
    """A tiny teacher by task, its configuration changed where asked."""
    stated = {
        "depth": {"teacher": "depth_anything", "input_size": 48, "grid": 6, "width": 16},
        "seg": {"teacher": "oneformer", "input_size": 64, "grid": 6, "width": 64},
        "gen": {"teacher": "unclip", "input_size": 32, "grid": 1, "width": 24},
    }

    def load(task: str, **changes: object) -> Teacher:
        return teachers.load(TeacherConfig(**{"weights": str(weights / task), **stated[task], **changes}))

    return load


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def _batch(teacher: Teacher, *images: Image.Image) -> torch.Tensor:
    return torch.stack([teacher.preprocess(image) for image in images])


@pytest.mark.parametrize(("task", "tokens", "width"), [("depth", 36, 16), ("seg", 36, 64), ("gen", 1, 24)])
def test_targets_have_the_promised_shape_and_repeat(
    make: Make, image: Image.Image, task: str, tokens: int, width: int
) -> None:
    teacher = make(task)
    pixels = _batch(teacher, image, image.rotate(90))
    features = teacher.encode(pixels)
    assert features.shape == (2, tokens, width)
    assert features.dtype == torch.float32
    assert torch.equal(features, teacher.encode(pixels))  # eval mode: no drop path, as the published teacher had
    assert not torch.equal(features[0], features[1])
    assert not teacher.model.training


@pytest.mark.parametrize("task", ["depth", "seg", "gen"])
def test_low_precision_stays_close(make: Make, image: Image.Image, task: str) -> None:
    full, low = make(task), make(task, dtype="bfloat16")
    expected = full.encode(_batch(full, image)).flatten()
    got = low.encode(_batch(low, image))
    assert got.dtype == torch.float32
    assert torch.cosine_similarity(expected, got.flatten(), dim=0) > 0.999


def test_maps_decode_from_targets_alone(make: Make, image: Image.Image) -> None:
    depth, seg, gen = make("depth"), make("seg"), make("gen")
    deep = depth.decode(depth.encode(_batch(depth, image, image)))
    assert deep.shape == (2, 48, 48)
    assert ((deep >= 0) & (deep <= 10)).all()  # metric, max_depth 10
    assert (depth.depth_sign, depth.depth_unit) == ("larger_is_farther", "m")
    labels = seg.decode(seg.encode(_batch(seg, image, image)))
    assert labels.shape == (2, 16, 16)
    assert labels.dtype == torch.int64
    assert set(labels.flatten().tolist()) <= seg.labels.keys() == {0, 1, 2, 3}
    assert gen.decode(gen.encode(_batch(gen, image))) is None


def test_the_view_decides_which_pixels_are_seen(make: Make) -> None:
    wide = Image.new("RGB", (96, 32), (0, 0, 255))
    wide.paste((255, 0, 0), (32, 0, 64, 32))  # the middle third is red
    red = {view: (make("gen", view=view).preprocess(wide)[0] > 0).float().mean() for view in ("squash", "center_crop")}
    assert red["center_crop"] == 1
    assert 0.2 < red["squash"] < 0.5


def test_depth_target_is_the_published_one(tmp_path: Path) -> None:
    """The published code's own numbers, for a tiny DINOv2 (24 blocks, 518 px) saved as a hub repository is.

    It fed the network BGR; here the image is swapped beforehand instead.
    """
    reference = load_file(DATA / "teacher_depth.safetensors")
    _save_published(tmp_path, {k[11:]: v for k, v in reference.items() if k.startswith("dino/state/")})
    stated = {"teacher": "depth_anything", "weights": str(tmp_path), "input_size": 336, "grid": 24, "width": 16}
    teacher = teachers.load(TeacherConfig(**stated, layers=[4, 11, 17, 23]))
    images = [Image.fromarray(reference[f"image{i}"].numpy()[:, :, ::-1].copy()) for i in range(2)]
    pixels = _batch(teacher, *images)
    torch.testing.assert_close(pixels[:, :, ::8, ::8], reference["pixel_ds8"], atol=1e-5, rtol=0)
    torch.testing.assert_close(teacher.encode(pixels), reference["target_mean4"], atol=1e-4, rtol=0)


def test_positions_are_resized_with_the_published_offset() -> None:
    positions = torch.randn(1, 1 + 37 * 37, 8, generator=torch.Generator().manual_seed(0))
    assert resize_positions(positions, 37) is positions
    resized = resize_positions(positions, 24)
    assert resized.shape == (1, 577, 8)
    assert torch.equal(resized[:, 0], positions[:, 0])
    square = positions[:, 1:].reshape(1, 37, 37, 8).permute(0, 3, 1, 2)
    plain = nn.functional.interpolate(square, size=24, mode="bicubic").flatten(2).transpose(1, 2)
    assert (resized[:, 1:] - plain).abs().max() > 0.01  # what a resize to the target size would give


def test_depth_layers_default_to_the_checkpoints_own(make: Make, image: Image.Image) -> None:
    default, same = make("depth"), make("depth", layers=[0, 1, 2, 3])
    assert default.describe()["layers"] == (0, 1, 2, 3)
    pixels = _batch(default, image)
    assert torch.equal(default.encode(pixels), same.encode(pixels))
    assert not torch.equal(default.encode(pixels), make("depth", layers=[2]).encode(pixels))


def test_oneformer_resizes_as_its_processor_says(make: Make, image: Image.Image) -> None:
    assert make("seg").preprocess(image).shape == (3, 64, 64)
    teacher = make("seg", input_size=40)
    assert teacher.preprocess(image).shape == (3, 64, 64)
    assert "40 by PIL bicubic then 64 by PIL bilinear" in teacher.identity("seg").preprocessing


# ---- identity


def test_identity_says_what_was_used(make: Make, weights: Path) -> None:
    identity = make("depth", view="pad").identity("depth")
    assert (identity.task, identity.weights, identity.view, identity.tokens) == ("depth", "depth", "pad", 36)
    assert identity.weights_hash == weights_hash(weights / "depth")
    assert identity == make("depth", view="pad").identity("depth")
    assert identity.digest != make("depth").identity("depth").digest


def test_weights_hash_is_over_tensors_not_files(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2, 3), "b": torch.zeros((), dtype=torch.bfloat16)}
    hashes = []
    for i, content in enumerate((tensors, dict(reversed(tensors.items())), {**tensors, "a": torch.ones(3, 2)})):
        (tmp_path / str(i)).mkdir()
        save_file(content, tmp_path / str(i) / "model.safetensors", metadata={"note": str(i)})
        hashes.append(weights_hash(tmp_path / str(i)))
    cut = tmp_path / "cut"
    cut.mkdir()
    save_file({"a": tensors["a"]}, cut / "1.safetensors")
    save_file({"b": tensors["b"]}, cut / "2.safetensors")
    (cut / "model.safetensors.index.json").write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    assert hashes[0] == hashes[1] == weights_hash(cut)
    assert hashes[0] != hashes[2]


# ---- what is refused


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("depth", {"grid": 8}, r"grid is 8, the network gives input_size 48 / patch 8"),
        ("depth", {"width": 17}, "width is 17, the network gives 16"),
        ("depth", {"layers": [4]}, r"layers is \[4\], the network gives blocks 0 to 3"),
        ("depth", {"layers": []}, "the network gives blocks 0 to 3"),
        ("seg", {"width": 32}, "width is 32, the network gives 64"),
        ("seg", {"layers": [1]}, "leave the key out"),
        ("gen", {"grid": 2}, r"one pooled token \(grid 1\)"),
        ("gen", {"input_size": 64}, "input_size is 64, the network gives 32"),
        ("gen", {"width": 16}, "width is 16, the network gives 24"),
        ("gen", {"layers": [1]}, "leave the key out"),
    ],
)
def test_what_a_network_cannot_give_is_refused(make: Make, task: str, change: dict[str, object], message: str) -> None:
    with pytest.raises(OlaError, match=message):
        make(task, **change)


def test_missing_weights_say_what_where_and_how(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OlaError, match=r"weights of teacher depth_anything: no folder .*/a/b/c; .*`make teachers`"):
        make("depth", weights="a/b/c")
    with pytest.raises(
        OlaError, match=r"nor 'some/repo' in the Hugging Face cache.*hf download some/repo --revision v1"
    ):
        make("gen", weights="some/repo", revision="v1")


def test_incomplete_and_pickled_weights_are_refused(make: Make, weights: Path, tmp_path: Path) -> None:
    shutil.copytree(weights / "depth", tmp_path / "depth")
    (tmp_path / "depth" / "model.safetensors").rename(tmp_path / "depth" / "pytorch_model.bin")
    with pytest.raises(OlaError, match=r"model\.safetensors: missing; pytorch_model\.bin is pickled and refused"):
        make("depth", weights=str(tmp_path / "depth")).identity("depth")
    (tmp_path / "depth" / "preprocessor_config.json").unlink()
    with pytest.raises(OlaError, match=r"preprocessor_config\.json: missing"):
        make("depth", weights=str(tmp_path / "depth"))


def test_unknown_teachers_are_refused_by_name(make: Make) -> None:
    with pytest.raises(OlaError, match=r"'midas' is not registered; known teachers: depth_anything, oneformer, unclip"):
        make("depth", teacher="midas")


# ---- the published backbone, as a hub repository


def _save_published(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """DINOv2's own names become those of the checkpoints on the hub; neck and head are random."""
    backbone = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=24,
        num_attention_heads=2,
        patch_size=14,
        image_size=518,
        mlp_ratio=2,
        out_indices=[5, 12, 18, 24],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(backbone_config=backbone, reassemble_hidden_size=16, neck_hidden_sizes=[8, 8, 8, 8])
    rest = DepthAnythingForDepthEstimation(config).state_dict()
    renamed = {name: tensor for name, tensor in rest.items() if not name.startswith("backbone.")}
    names = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "mask_token": "embeddings.mask_token",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
        "attn.proj": "attention.output.dense",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
    }
    for name, tensor in state.items():
        prefix, end = "backbone.", name
        if name.startswith("blocks."):
            _, number, end = name.split(".", 2)
            prefix = f"backbone.encoder.layer.{number}."
        stem, _, kind = end.rpartition(".")
        if stem == "attn.qkv":
            for part, chunk in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[f"{prefix}attention.attention.{part}.{kind}"] = chunk.clone()
        elif end in names:
            renamed[prefix + names[end]] = tensor
        else:
            renamed[f"{prefix}{names.get(stem, stem)}.{kind}"] = tensor
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
