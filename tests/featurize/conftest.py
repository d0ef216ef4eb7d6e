"""A tiny world: adopted tars with every kind of sample, teachers of the real architectures with random weights."""

import copy
import io
import json
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    SwinConfig,
)

from featurize.__main__ import main
from featurize.corpus.adopt import adopt
from featurize.stage import Job, run_pipeline
from featurize.teachers.base import Teacher
from featurize.teachers.unclip import UnClip
from olavlm import cli
from olavlm.config import PipelineConfig, load_pipeline
from olavlm.data.corpus import Corpus

TRUNCATED = ("t0s2", "t1s2")  # keys of images that cannot be decoded


@dataclass
class World:
    """A corpus, teachers' weights, and a pipeline file over them."""

    folder: Path
    file: Path

    def config(self, run: Path, *overrides: str) -> PipelineConfig:
        return load_pipeline(str(self.file), [f"run_dir={run}", *overrides])

    def corpus(self) -> Corpus:
        return Corpus.open(self.folder / "corpus")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Products this small only lose by more, and lose much where other processes want the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with depth, seg and gen in the layouts of their Hugging Face repositories; not to be changed.

    A network is read from there once, however many runs use it: reading it takes longer than a run.
    """
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    dinov2 = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        patch_size=8,
        image_size=64,
        mlp_ratio=2,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    depth = DepthAnythingConfig(
        backbone_config=dinov2,
        patch_size=8,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
        depth_estimation_type="metric",
        max_depth=10,
    )
    DepthAnythingForDepthEstimation(depth).save_pretrained(folder / "depth")
    swin = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        image_size=64,
        drop_path_rate=0.5,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    seg = OneFormerConfig(
        backbone_config=swin,
        num_queries=8,
        hidden_dim=32,
        conv_dim=32,
        mask_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        query_dec_layers=1,
        num_attention_heads=2,
        num_labels=4,
        task_seq_len=12,
        is_training=False,
    )
    OneFormerForUniversalSegmentation(seg).save_pretrained(folder / "seg")
    words = ["!", "the</w>", "task</w>", "is</w>", "semantic</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "seg" / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "seg" / "merges.txt").write_text("#version: 0.2\n")
    (folder / "seg" / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    clip = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=24,
    )
    CLIPVisionModelWithProjection(clip).save_pretrained(folder / "gen" / "image_encoder")
    statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.25]}
    for name, size in (
        ("depth", 48),
        ("seg", {"shortest_edge": 64, "longest_edge": 128}),
        ("gen/feature_extractor", 32),
    ):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "preprocessor_config.json").write_text(json.dumps({**statistics, "size": size}))
    networks: dict[Any, torch.nn.Module] = {}
    read = Teacher.model.func

    def model(self: Teacher) -> torch.nn.Module:
        if not self.folder.is_relative_to(folder):
            return read(self)
        key = type(self), self.config.model_dump_json()
        if key not in networks:
            networks[key] = read(self)
        return copy.deepcopy(networks[key])  # a teacher may move its network, or change it

    once = cached_property(model)
    once.__set_name__(Teacher, "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "model", once)
        yield folder


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> World:
    """Two tars of 7 and 5 samples (13 images, two of them truncated); targets go to RUN/targets."""
    folder = tmp_path_factory.mktemp("world")
    tars = [_write_tar(folder / f"{t}.tar", t, samples) for t, samples in enumerate((7, 5))]
    adopt(tars, folder / "corpus")
    pipeline = {
        "name": "tiny",
        "run_dir": "runs/tiny",
        "data": {"all": {"corpus": str(folder / "corpus"), "targets": "${run_dir}/targets"}},
        "teachers": {
            "depth": _teacher("depth_anything", weights / "depth", 48, 6, 16, batch_size=4),
            "seg": _teacher("oneformer", weights / "seg", 64, 6, 64, batch_size=3),
            "gen": _teacher("unclip", weights / "gen", 32, 1, 24, batch_size=5, codec="fp16"),
        },
        "featurize": {"executor": "inprocess", "block": 4},
        "student": {"vision_tower": "none", "language_model": "none", "tasks": ["depth"], "layers": {"depth": [1]}},
        "stages": {},
    }
    file = folder / "tiny.yaml"
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(pipeline)))
    return World(folder, file)


@pytest.fixture(scope="session")
def unbroken(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests may not change it."""
    run = tmp_path_factory.mktemp("unbroken")
    run_pipeline(world.config(run))
    return run


@pytest.fixture(scope="session")
def stumbled(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in which the second image of every batch of gen had no finite features; not to be changed."""
    return _stumble(world, tmp_path_factory.mktemp("stumbled"))


@pytest.fixture(scope="session")
def in_tars(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """`unbroken` and `stumbled` in the WebDataset form."""
    run = tmp_path_factory.mktemp("unbroken")
    run_pipeline(world.config(run, "featurize.format=webdataset"))
    return run, _stumble(world, tmp_path_factory.mktemp("stumbled"), "featurize.format=webdataset")


def _stumble(world: World, run: Path, *overrides: str) -> Path:
    encode = UnClip.encode

    def broken(self: UnClip, pixels: torch.Tensor) -> torch.Tensor:
        features = encode(self, pixels).clone()
        features[1] = torch.nan
        return features

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UnClip, "encode", broken)
        run_pipeline(world.config(run, *overrides))
    return run


@pytest.fixture
def own(unbroken: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may damage."""
    return Path(shutil.copytree(unbroken / "targets", tmp_path / "run" / "targets")).parent


@pytest.fixture
def command(world: World, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run ``python -m featurize NAME PIPELINE [SET] run_dir=RUN …``; returns the exit code."""

    def call(name: str, run: Path, *arguments: str) -> int:
        first = [argument for argument in arguments[:1] if not argument.startswith("--")]
        rest = arguments[len(first) :]
        monkeypatch.setattr(sys, "argv", ["featurize", name, str(world.file), *first, f"run_dir={run}", *rest])
        return cli.run(main)

    return call


@pytest.fixture(scope="session")
def stored() -> Callable[[Job], dict[tuple[str, str, str, int], bytes]]:
    """Every target's stored bytes, wherever they lie."""

    def read(job: Job) -> dict[tuple[str, str, str, int], bytes]:
        found = {}
        for task, target in job.sets.items():
            for tar in job.corpus.tars:
                for row in target.commit(tar).to_pylist():
                    if row["status"] == "ok":
                        values, scales = target.read(row, row["key"])
                        bytes_of = values.tobytes() + (b"" if scales is None else scales.tobytes())
                        found[task, tar.name, row["key"], row["image_index"]] = bytes_of
        return found

    return read


@pytest.fixture(scope="session")
def write_tar() -> Callable[[Path, int, int], Path]:
    """`_write_tar`, for corpora of another size."""
    return _write_tar


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, bytes | None]]:
    """Everything below a folder: files with their content, folders as None."""

    def read(folder: Path) -> dict[str, bytes | None]:
        return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}

    return read


def _teacher(name: str, weights: Path, size: int, grid: int, width: int, **more: object) -> dict[str, object]:
    return {"teacher": name, "weights": str(weights), "input_size": size, "grid": grid, "width": width, **more}


def _write_tar(path: Path, number: int, samples: int) -> Path:
    """Sample 1 has two images, 2 a truncated one, 3 none; the others one each."""
    rng = np.random.default_rng(number)
    with tarfile.open(path, "w") as tar:
        for s in range(samples):
            key = f"t{number}s{s}"
            count = {1: 2, 3: 0}.get(s, 1)
            for i in range(count):
                buffer = io.BytesIO()
                blobs = rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
                Image.fromarray(blobs).resize((60 + 5 * s, 45 + i)).save(buffer, "PNG")
                data = buffer.getvalue()
                _add(tar, f"{key}.{i}.png" if count > 1 else f"{key}.png", data[:200] if key in TRUNCATED else data)
            turns = [{"from": "human", "value": "<image>" * count + "what?"}, {"from": "gpt", "value": "that"}]
            _add(tar, f"{key}.json", json.dumps({"conversations": turns}).encode())
    return path


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
