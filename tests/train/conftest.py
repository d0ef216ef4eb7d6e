"""A pipeline small enough to train in seconds: packed corpora, random targets in a real store, a tiny student."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from featurize.corpus.pack import pack_llava_json
from olavlm.config import Format, PipelineConfig, TeacherConfig, load_pipeline
from olavlm.data import codec
from olavlm.data.commit import TarWriter, describe_arrays, tar_blocks
from olavlm.data.corpus import Corpus
from olavlm.data.targets import Identity, TargetSet, TargetStore
from train import stage as stages

WORDS = ["USER", ":", "ASSISTANT", "what", "is", "this", "a", "red", "blue", "green", "cube", "ball", "one", "and"]
SAMPLES, SAMPLES_PER_TAR = 24, 10
FAILED = "s05"  # its image has no depth target


@dataclass
class World:
    """A pipeline file and the folder that everything it names lies in."""

    folder: Path
    file: Path

    def config(self, *overrides: str) -> PipelineConfig:
        return load_pipeline(str(self.file), list(overrides))

    def corpus(self) -> Corpus:
        return Corpus.open(self.folder / "corpus")

    def target_set(self, task: str) -> TargetSet:
        store = TargetStore.open(self.folder / "targets", self.corpus().id)
        return store.find(task, self.config().teachers[task])


@pytest.fixture(autouse=True)
def _one_deterministic_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def _shared_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Built once; tests get it through `world`, which may not change it, or `own_world`, a copy."""
    folder = tmp_path_factory.mktemp("world")
    torch.set_num_threads(1)
    _save_student_parts(folder)
    _pack(folder)
    pipeline = _pipeline(folder)
    file = folder / "tiny.yaml"
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(pipeline)))
    world = World(folder, file)
    for task, teacher in world.config().teachers.items():
        commit_targets(world, task, teacher)
    return world


@pytest.fixture
def world(_shared_world: World) -> World:
    return _shared_world


@pytest.fixture
def own_world(_shared_world: World, tmp_path: Path) -> World:
    """A copy that a test may damage."""
    folder = tmp_path / "world"
    shutil.copytree(_shared_world.folder, folder)
    text = _shared_world.file.read_text().replace(str(_shared_world.folder), str(folder))
    (folder / "tiny.yaml").write_text(text)
    return World(folder, folder / "tiny.yaml")


@pytest.fixture(scope="session")
def commit() -> Callable[..., TargetSet]:
    return commit_targets


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Calls a function in the middle of the n-th step (1-based) that is trained from now on."""

    def install(step: int, act: Callable[[], None]) -> None:
        original, calls = stages.accumulate, 0

        def accumulate(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step:
                act()
            return original(*args)

        monkeypatch.setattr(stages, "accumulate", accumulate)

    return install


def commit_targets(
    world: World, task: str, teacher: TeacherConfig, constant: bool = False, form: Format = "zarr"
) -> TargetSet:
    """Random targets for every image of the world's corpus, committed as featurization does; or one for all of them.

    A set that is there in another form is replaced.
    """
    corpus = world.corpus()
    store = TargetStore.create(world.folder / "targets", corpus.id)
    identity = Identity(
        task=task,
        teacher=teacher.teacher,
        weights=teacher.weights,
        revision=None,
        weights_hash="0" * 32,
        compute_dtype=teacher.dtype,
        view=teacher.view,
        input_size=teacher.input_size,
        preprocessing="none",
        position_embedding="none",
        layers=None,
        pooling="none",
        grid=teacher.grid,
        width=teacher.width,
        codec=teacher.codec,
    )
    for other in store.targets():
        if other.identity == identity and other.format != form:
            shutil.rmtree(str(other.path))
    target = store.add(identity, block=4, form=form)
    blocks = tar_blocks(corpus.tars, 4)
    describe_arrays(target, rows=100)
    rng = np.random.default_rng(len(task))
    features = None
    for tar in corpus.tars:
        writer = TarWriter.open(target, tar, blocks[tar.name])
        assert writer is not None
        with writer:
            for row in corpus.index(tar).to_pylist():
                if features is None or not constant:
                    features = rng.normal(size=(1, teacher.tokens, teacher.width)).astype(np.float32)
                values, scales = codec.encode(features, teacher.codec)
                if row["image_index"] < 0:
                    writer.no_image(row["key"])
                elif row["key"] == FAILED and task == "depth":
                    writer.fail(row["key"], row["image_index"], row["image_hash"], "no features today")
                else:
                    scale = None if scales is None else scales[0]
                    writer.add(row["key"], row["image_index"], row["image_hash"], values[0], scale, 1.0, 3.0)
            writer.commit()
    return target


def _pack(folder: Path) -> None:
    """24 samples in 3 tars; s00 … in order, every eighth is text only, every seventh has two images."""
    images = folder / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    entries = []
    for i in range(SAMPLES):
        count = 0 if i % 8 == 3 else 2 if i % 7 == 6 else 1
        names = [f"{i:02}_{j}.png" for j in range(count)]
        for name in names:
            pixels = rng.integers(0, 256, (24 + i, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / name)
        answer = " ".join(rng.choice(WORDS[3:], 2 + i % 5))
        entry = {
            "id": f"s{i:02}",
            "image": names,
            "conversations": [
                {"from": "human", "value": "<image>" * count + " what is this"},
                {"from": "gpt", "value": answer},
            ],
        }
        entries.append(entry if names else {k: v for k, v in entry.items() if k != "image"})
    (folder / "data.json").write_text(json.dumps(entries))
    report = pack_llava_json(folder / "data.json", [images], folder / "corpus", SAMPLES_PER_TAR)
    assert not report.left_out


def _pipeline(folder: Path) -> dict[str, object]:
    teacher = {"teacher": "some", "input_size": 32}
    stage = {"data": ["all"], "lr": 1e-3, "max_length": 128, "log_every": 1, "max_missing": 0.1}
    return {
        "name": "tiny",
        "run_dir": str(folder / "runs"),
        "data": {"all": {"corpus": str(folder / "corpus"), "targets": str(folder / "targets")}},
        "teachers": {
            "gen": {**teacher, "weights": "g", "grid": 1, "width": 5, "codec": "fp16"},
            "depth": {**teacher, "weights": "d", "grid": 2, "width": 6},
        },
        "student": {
            "vision_tower": str(folder / "tower"),
            "language_model": str(folder / "llm"),
            "tasks": ["gen", "depth"],
            "task_tokens": 2,
            "layers": {"depth": [1, 2], "gen": [2]},
        },
        "stages": {
            "pretrain": {
                **stage,
                "trainable": ["projector", "task_tokens", "predictors", "logit_scales", "language_model"],
                "losses": {"depth": 0.5, "gen": 0.5},
                "global_batch": 8,
                "micro_batch": 4,
                "checkpoint_every": 2,
                "epochs": 2,
            },
            "finetune": {
                **stage,
                "init": "pretrain",
                "trainable": ["projector", "language_model"],
                "global_batch": 6,
                "micro_batch": 6,
                "group_by_length": True,
            },
        },
        "probe": {
            "data": "all",
            "students": ["initial", "pretrain"],
            "tasks": ["depth", "gen"],
            "steps": 4,
            "batch": 8,
            "max_length": 128,
            "max_missing": 0.1,
        },
    }


def _save_student_parts(folder: Path) -> None:
    """A CLIP tower of 16 image tokens and a Llama of two layers, in the hub's layout."""
    torch.manual_seed(1)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    CLIPVisionModel(vision).save_pretrained(folder / "tower")
    sizes = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}}
    CLIPImageProcessorPil(**sizes).save_pretrained(folder / "tower")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **tokens).save_pretrained(folder / "llm")
    text = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(text).save_pretrained(folder / "llm")
