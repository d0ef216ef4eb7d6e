import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

from featurize import teachers
from featurize.__main__ import main
from featurize.teachers.base import Teacher, architecture_hash, weights_hash
from featurize.teachers.depth_anything import DepthAnything, resize_positions
from featurize.teachers.published import PUBLISHED
from olavlm import cli as command_line
from olavlm.config import TeacherConfig
from olavlm.errors import OlaError

DATA = Path(__file__).resolve().parents[2] / "data"
Make = Callable[..., Teacher]
Cli = Callable[..., int]


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


@pytest.fixture
def copied(weights: Path, tmp_path: Path) -> Path:
    """The depth teacher's folder, to be damaged."""
    return Path(shutil.copytree(weights / "depth", tmp_path / "depth"))


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Cli:
    """`python -m featurize` in this process: arguments → exit code."""

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["featurize", *arguments])
        return command_line.run(main)

    return call


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("task", ["depth", "seg", "gen"])
def test_low_precision_stays_close(make: Make, image: Image.Image, task: str, dtype: str) -> None:
    full, low = make(task), make(task, dtype=dtype)
    expected = full.encode(_batch(full, image)).flatten()
    got = low.encode(_batch(low, image))
    assert got.dtype == torch.float32
    assert torch.cosine_similarity(expected, got.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("task", ["depth", "seg", "gen"])
def test_a_target_does_not_depend_on_its_neighbours_in_the_batch(make: Make, image: Image.Image, task: str) -> None:
    """The last batch of a tar is padded with zeros; where an image lies and beside what changes no bit."""
    teacher = make(task)
    one, two, three = _batch(teacher, image, image.rotate(90), image.rotate(180))
    nothing = torch.zeros_like(one)
    full = teacher.encode(torch.stack([one, two, three, one]))
    padded = teacher.encode(torch.stack([one, two, nothing, nothing]))
    assert torch.equal(full[:2], padded[:2])
    assert torch.equal(full[0], full[3])


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


@pytest.mark.parametrize("lifted", [0.0, 1.0])
def test_depth_is_decoded_as_the_published_head_decodes_it(tmp_path: Path, lifted: float) -> None:
    """One feature map in the place of each of the head's four, with the published head's names and weights.

    Its own output in the reference is below zero everywhere before the last ReLU, so 0: lifted by 1 there is a picture
    to compare, with the head as written down in `_published_head`.
    """
    reference = load_file(DATA / "teacher_depth_head.safetensors")
    state = {k.removeprefix("state/"): v for k, v in reference.items() if k.startswith("state/")}
    state["scratch.output_conv2.2.bias"] += lifted
    backbone = Dinov2Config(
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=336,
        patch_size=14,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=24, neck_hidden_sizes=[4, 4, 8, 8], fusion_hidden_size=8
    )
    network = DepthAnythingForDepthEstimation(config)
    missing, unexpected = network.load_state_dict({_name_of_head(k): v for k, v in state.items()}, strict=False)
    assert not unexpected
    assert {name.split(".")[0] for name in missing} == {"backbone"}
    network.save_pretrained(tmp_path)
    _save_statistics(tmp_path)
    stated = {"teacher": "depth_anything", "weights": str(tmp_path), "input_size": 336, "grid": 24, "width": 24}
    depth = teachers.load(TeacherConfig(**stated)).decode(reference["features"])
    assert depth is not None
    written_down = _published_head(state, reference["features"])
    torch.testing.assert_close(depth, written_down, atol=1e-5, rtol=0)
    if lifted:
        assert written_down.std() > 1e-3
    else:
        torch.testing.assert_close(depth[:, ::4, ::4], reference["depth_ds4"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("size", "width", "layers"), [("Small", 384, (2, 5, 8, 11)), ("Large", 1024, (4, 11, 17, 23))])
def test_depth_anything_as_the_hub_states_it(tmp_path: Path, size: str, width: int, layers: tuple[int, ...]) -> None:
    """Small's and Base's files do not say how many blocks there are: Dinov2's default."""
    files = PUBLISHED[f"depth-anything/Depth-Anything-V2-{size}-hf"]
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    save_file({"none": torch.zeros(1)}, tmp_path / "model.safetensors")
    stated = {"teacher": "depth_anything", "weights": str(tmp_path), "input_size": 336, "grid": 24, "width": width}
    teacher = teachers.load(TeacherConfig(**stated))
    assert teacher.describe()["layers"] == layers
    assert teacher.depth_sign == "larger_is_closer"


@pytest.mark.parametrize(
    ("weights", "million"),
    [
        ("depth-anything/Depth-Anything-V2-Small-hf", 24.8),
        ("depth-anything/Depth-Anything-V2-Base-hf", 97.5),
        ("depth-anything/Depth-Anything-V2-Large-hf", 335.3),
        ("shi-labs/oneformer_coco_swin_large", 219),
        ("stabilityai/stable-diffusion-2-1-unclip", 632),
        ("facebook/dinov2-large", 304),
        ("google/siglip-so400m-patch14-384", 878),
    ],
)
def test_published_architectures_have_the_published_size(weights: str, million: float) -> None:
    config = next(content for name, content in PUBLISHED[weights].items() if name.endswith("/config.json")
                  or name == "config.json")  # fmt: skip
    network = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        model = network(network.config_class.from_dict(config))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(million, rel=0.005)


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
    assert identity.weights_hash.partition("-")[0] == weights_hash(weights / "depth")
    assert identity == make("depth", view="pad").identity("depth")
    assert identity.digest != make("depth").identity("depth").digest


def test_identity_covers_how_the_network_computes_and_no_names(
    make: Make, weights: Path, tmp_path: Path, image: Image.Image
) -> None:
    """The same tensors under another activation are another teacher, as where a mirror's config.json lacks it."""
    shutil.copytree(weights / "gen", tmp_path / "gen")
    file = tmp_path / "gen" / "image_encoder" / "config.json"
    stated = json.loads(file.read_text())

    def teacher(**changes: object) -> Teacher:
        kept = {name: value for name, value in {**stated, **changes}.items() if value is not None}
        file.write_text(json.dumps(kept))
        return make("gen", weights=str(tmp_path / "gen"))

    ours = teacher(hidden_act=None)  # transformers' default for a CLIP: quick_gelu
    identity, features = ours.identity("gen"), ours.encode(_batch(ours, image))
    assert ours.identity("gen") == identity  # read or not
    same = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "transformers_version": "4.0", "torch_dtype": "float16"}
    assert teacher(**same, _name_or_path="a/b", architectures=["CLIPModel"]).identity("gen") == identity
    for changes in ({"hidden_act": "gelu"}, {"num_attention_heads": 4}, {"layer_norm_eps": 0.1}):
        other = teacher(**changes)
        assert not torch.equal(other.encode(_batch(other, image)), features)
        assert other.identity("gen").digest != identity.digest
        assert other.identity("gen").weights_hash.partition("-")[0] == identity.weights_hash.partition("-")[0]


@pytest.mark.parametrize("weights", PUBLISHED)
def test_a_configuration_is_the_same_with_its_defaults_spelled_out(weights: str) -> None:
    stated = next(content for name, content in PUBLISHED[weights].items() if name.endswith("config.json"))
    short = CONFIG_MAPPING[stated["model_type"]].from_dict(json.loads(json.dumps(stated)))
    long = type(short).from_dict(json.loads(short.to_json_string(use_diff=False)))
    assert architecture_hash(long) == architecture_hash(short)


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


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.ckpt"])
def test_pickled_weights_are_refused(make: Make, copied: Path, name: str) -> None:
    (copied / "model.safetensors").rename(copied / name)
    with pytest.raises(
        OlaError, match=rf"model\.safetensors: missing; {name} is pickled and refused.*safetensors --help"
    ):
        make("depth", weights=str(copied))


def test_pickled_tensors_become_safetensors_and_code_does_not(make: Make, copied: Path, cli: Cli) -> None:
    expected = make("depth").identity("depth").weights_hash
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    assert cli("safetensors", str(copied)) == 0
    assert make("depth", weights=str(copied)).identity("depth").weights_hash == expected
    assert cli("safetensors", str(copied)) == 2  # they are there
    (copied / "model.safetensors").unlink()
    torch.save({"weight": Path}, copied / "pytorch_model.bin")
    assert cli("safetensors", str(copied)) == 2
    assert not (copied / "model.safetensors").exists()


@pytest.mark.parametrize("task", ["depth", "seg", "gen"])
@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_torn_weights_are_refused(make: Make, weights: Path, tmp_path: Path, task: str, keep: int) -> None:
    shutil.copytree(weights / task, tmp_path / task)
    file = next((tmp_path / task).rglob("model.safetensors"))
    file.write_bytes(file.read_bytes()[:keep])
    teacher = make(task, weights=str(tmp_path / task))
    with pytest.raises(OlaError, match=r"model\.safetensors: torn or no safetensors file \(.*\); fetch it again"):
        teacher.identity(task)
    with pytest.raises(OlaError, match=r"cannot be loaded as \w+: "):
        _ = teacher.model


@pytest.mark.parametrize("task", ["depth", "seg", "gen"])
def test_weights_with_a_tensor_missing_or_of_another_shape_are_refused(
    make: Make, weights: Path, tmp_path: Path, task: str
) -> None:
    """transformers would make up what is missing, and go on with a warning."""
    shutil.copytree(weights / task, tmp_path / task)
    file = next((tmp_path / task).rglob("model.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("layernorm.weight"))
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != name}, "1 tensors are missing, among them .*layernorm.weight"),
        ({**tensors, name: torch.ones(3)}, r"layernorm.weight is \(3,\), config.json makes it \("),
    ):
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(OlaError, match=message):
            _ = make(task, weights=str(tmp_path / task)).model


def test_code_in_a_repository_is_never_run(make: Make, copied: Path) -> None:
    (copied / "modeling_evil.py").write_text("raise SystemExit('code of the repository was run')")
    config = json.loads((copied / "config.json").read_text())
    auto_map = {"AutoConfig": "modeling_evil.Config", "AutoModel": "modeling_evil.Model"}
    for name in ("depth_anything", "vision_model"):
        (copied / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": auto_map}))
        with pytest.raises(
            OlaError, match=r"config\.json: model_type is 'evil', .*; code of its own \(auto_map\) is never run"
        ):
            make("depth", weights=str(copied), teacher=name)
    (copied / "config.json").write_text(
        json.dumps({**config, "auto_map": auto_map})
    )  # transformers has this one itself
    assert type(make("depth", weights=str(copied)).model) is DepthAnythingForDepthEstimation


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("preprocessor_config.json", None, "preprocessor_config.json: missing"),
        ("preprocessor_config.json", "{", "preprocessor_config.json: not JSON"),
        ("preprocessor_config.json", "{}", "image_mean and image_std are None and None; expected three numbers each"),
        ("preprocessor_config.json", '{"rescale_factor": 0.0078}', "pixels are not rescaled by 1 / 255"),
        ("config.json", None, "config.json: missing"),
        ("config.json", '{"model_type": "depth_anything", "patch_size": "x"}', "no configuration of a depth_anything"),
        ("config.json", '{"model_type": "dinov2"}', "model_type is dinov2, the network gives depth_anything"),
        ("config.json", "{}", "model_type is None, which this transformers does not have"),
    ],
)
def test_broken_folders_are_refused_by_name(
    make: Make, copied: Path, file: str, content: str | None, message: str
) -> None:
    if content is None:
        (copied / file).unlink()
    else:
        (copied / file).write_text(content)
    with pytest.raises(OlaError, match=message):
        make("depth", weights=str(copied))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("midas", r"'midas' is not known; expected depth_anything, .*, vision_model or package.module:Class"),
        ("no.such.module:Teacher", r"'no.such.module:Teacher': No module named 'no'"),
        ("featurize.teachers.base:Pupil", r"'featurize.teachers.base:Pupil': .* has no attribute 'Pupil'"),
        (":Teacher", r"':Teacher': Empty module name"),
        ("pathlib:Path", r"'pathlib:Path': expected a subclass of featurize.teachers.base.Teacher"),
    ],
)
def test_unknown_teachers_are_refused_by_name(make: Make, name: str, message: str) -> None:
    with pytest.raises(OlaError, match=message):
        make("depth", teacher=name)


class Upside(DepthAnything):
    """A teacher of somebody's own."""

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        return super().preprocess(image.rotate(180))


def test_a_teacher_of_ones_own_is_named_by_its_class(make: Make, image: Image.Image) -> None:
    own, ours = make("depth", teacher=f"{__name__}:Upside"), make("depth")
    assert torch.equal(own.encode(_batch(own, image)), ours.encode(_batch(ours, image.rotate(180))))
    assert own.identity("depth") != ours.identity("depth")


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
    _save_statistics(folder)


def _save_statistics(folder: Path) -> None:
    statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))


def _name_of_head(name: str) -> str:
    """A name in the published DPT head, as the checkpoints on the hub have it."""
    for pattern, replacement in (
        (r"^projects\.(\d)", r"neck.reassemble_stage.layers.\1.projection"),
        (r"^resize_layers\.(\d)", r"neck.reassemble_stage.layers.\1.resize"),
        (r"^scratch\.refinenet(\d)", lambda found: f"neck.fusion_stage.layers.{4 - int(found[1])}"),
        (r"^scratch\.layer(\d)_rn", lambda found: f"neck.convs.{int(found[1]) - 1}"),
        (r"out_conv", "projection"),
        (r"resConfUnit(\d)\.conv(\d)", r"residual_layer\1.convolution\2"),
        (r"^scratch\.output_conv1", "head.conv1"),
        (r"^scratch\.output_conv2\.0", "head.conv2"),
        (r"^scratch\.output_conv2\.2", "head.conv3"),
    ):
        name = re.sub(pattern, replacement, name)
    return name


def _published_head(state: dict[str, torch.Tensor], features: torch.Tensor) -> torch.Tensor:
    """The DPT head of Depth-Anything-V2 (`dpt.py`) on features (n, 24², width) in the place of all its four inputs."""

    def conv(name: str, x: torch.Tensor, **options: int) -> torch.Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)

    def unit(name: str, x: torch.Tensor) -> torch.Tensor:
        return x + conv(f"{name}.conv2", F.relu(conv(f"{name}.conv1", F.relu(x), padding=1)), padding=1)

    def up(x: torch.Tensor, side: int) -> torch.Tensor:
        return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=True)

    square = features.transpose(1, 2).unflatten(2, (24, 24))
    maps = [conv(f"projects.{i}", square) for i in range(4)]
    for i, stride in ((0, 4), (1, 2)):
        name = f"resize_layers.{i}"
        maps[i] = F.conv_transpose2d(maps[i], state[f"{name}.weight"], state[f"{name}.bias"], stride=stride)
    maps[3] = conv("resize_layers.3", maps[3], stride=2, padding=1)
    maps = [conv(f"scratch.layer{i + 1}_rn", x, padding=1) for i, x in enumerate(maps)]
    path = torch.zeros_like(maps[3])
    for i in (3, 2, 1, 0):
        name = f"scratch.refinenet{i + 1}"
        path = path + (unit(f"{name}.resConfUnit1", maps[i]) if i < 3 else maps[i])
        path = unit(f"{name}.resConfUnit2", path)
        path = conv(f"{name}.out_conv", up(path, maps[i - 1].shape[-1] if i else 2 * path.shape[-1]))
    out = up(conv("scratch.output_conv1", path, padding=1), 24 * 14)
    out = conv("scratch.output_conv2.2", F.relu(conv("scratch.output_conv2.0", out, padding=1)))
    return F.relu(out)[:, 0]
