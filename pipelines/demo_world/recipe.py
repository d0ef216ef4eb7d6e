"""The recipe for everything under `weights/`, from nothing: teachers, what the student starts from, cue model.

One function per folder: train, save as the hub would, say what only training can measure. `make_teachers` runs them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import CLIPVisionModel, CLIPVisionModelWithProjection

from pipelines.demo_world import (
    clip,
    hub,
    train_cues,
    train_depth,
    train_generation,
    train_language,
    train_segmentation,
    train_tower,
)
from pipelines.demo_world.build import Told
from pipelines.demo_world.cues import THREE_D
from pipelines.demo_world.samples import SIZE, Samples
from pipelines.demo_world.scenes import CLASSES

Numbers = dict[str, float]


@dataclass(frozen=True)
class Sizes:
    """How many scenes to train on, to judge on (split ``gates``) and to read about; steps of each training."""

    train: int
    judge: int
    read: int
    steps: dict[str, int]


FULL = Sizes(12000, 1024, 6000, {"seg": 6000, "depth": 3600, "student": 3600, "gen": 1500, "llm": 4800, "cues": 3000})
QUICK = Sizes(128, 256, 80, {"seg": 3, "student": 2, "depth": 2, "gen": 3, "llm": 2, "cues": 2})


@dataclass(frozen=True)
class Material:
    """What trainings are given."""

    train: Samples
    judge: Samples
    told: list[Told]  # about scenes of `train`


def depth_teacher(material: Material, steps: int, seed: int, folder: Path) -> Numbers:
    """DepthAnything."""
    model, _ = train_depth.train(material.train, steps, seed=seed)
    hub.save(model, folder)
    own = {"keep_aspect_ratio": False, "ensure_multiple_of": train_depth.PATCH}
    hub.write_processor(
        folder, {**hub.processor("DPTImageProcessor", SIZE, 3, train_depth.MEAN, train_depth.STD), **own}
    )
    return {}


def segmentation_teacher(material: Material, steps: int, seed: int, folder: Path) -> Numbers:
    """OneFormer with its processor and tokenizer."""
    model, _ = train_segmentation.train(material.train, steps, seed=seed)
    hub.save(model, folder)
    train_segmentation.tokenizer().save_pretrained(folder)
    things = [i for i, name in enumerate(CLASSES) if name not in ("floor", "wall")]
    names = {"class_names": list(CLASSES), "thing_ids": things, **{str(i): name for i, name in enumerate(CLASSES)}}
    length = train_segmentation.TASK_LENGTH
    own = {
        "class_info_file": "",  # a file on the hub, elsewhere; here `metadata` says it all
        "metadata": names,
        "num_labels": len(CLASSES),
        "num_text": train_segmentation.QUERIES,
    }
    plain = hub.processor("OneFormerImageProcessor", SIZE, 2, train_segmentation.MEAN, train_segmentation.STD)
    hub.write_processor(folder, {**plain, **own})
    lengths = {"processor_class": "OneFormerProcessor", "max_seq_length": length, "task_seq_length": length}
    (folder / "processor_config.json").write_text(json.dumps(lengths, indent=2) + "\n")
    return {}


def generation_teacher(material: Material, steps: int, seed: int, folder: Path) -> Numbers:
    """The image encoder of an unCLIP, a CLIP that shares nothing with the student's."""
    model, words = train_generation.train(material.train, steps, seed=seed)
    model.half().float()  # type: ignore[no-untyped-call]  # measured as it is stored
    encoder = CLIPVisionModelWithProjection(model.vision_model.config)
    encoder.vision_model.load_state_dict(model.vision_model.state_dict())
    encoder.visual_projection.load_state_dict(model.visual_projection.state_dict())
    hub.save(encoder, folder / "image_encoder")
    hub.write_processor(folder / "feature_extractor", hub.clip_processor(SIZE, clip.MEAN, clip.STD))
    return {"recall_at_1_of_256": clip.recall(model, words, material.judge, whole=True)}


def student_tower(material: Material, steps: int, seed: int, folder: Path) -> Numbers:
    """The student's CLIP tower."""
    model, words = train_tower.train(material.train, steps, seed=seed)
    model.half().float()  # type: ignore[no-untyped-call]  # measured as it is stored
    tower = CLIPVisionModel(model.vision_model.config)
    tower.load_state_dict(model.vision_model.state_dict())
    hub.save(tower, folder)
    hub.write_processor(folder, hub.clip_processor(SIZE, clip.MEAN, clip.STD))
    return {"recall_at_1_of_256": clip.recall(model, words, material.judge, whole=False)}


def language_model(material: Material, steps: int, seed: int, folder: Path) -> Numbers:
    """A Llama and its tokenizer."""
    words = train_language.make_tokenizer(material.told)
    model, _, measured = train_language.train(material.told, words, steps, seed=seed)
    hub.save(model, folder)
    words.save_pretrained(folder)
    return measured


def cue_model(material: Material, steps: int, seed: int, folder: Path) -> Numbers:
    """What questions are chosen by; one model for both levels, as what boxes tell of depth is the same."""
    scenes = len(material.train.scenes)
    asked = train_cues.gather("teachers", {"easy": scenes, "hard": scenes // 6}, workers=1)
    train_cues.save(
        {
            f"{task}.{name}": tensor
            for task in THREE_D
            for name, tensor in train_cues.train(task, [q for q in asked if q.task == task], steps, seed).items()
        },
        folder,
    )
    return {}


@dataclass(frozen=True)
class Job:
    """One training: the folder it makes, what runs it, its seed."""

    folder: str
    run: Callable[[Material, int, int, Path], Numbers]
    seed: int


#: The longest first.
JOBS = {
    "llm": Job("student/llm", language_model, seed=0),
    "seg": Job("seg", segmentation_teacher, seed=0),
    "depth": Job("depth", depth_teacher, seed=0),
    "gen": Job("gen", generation_teacher, seed=2),
    "student": Job("student/vision", student_tower, seed=1),
    "cues": Job("cues", cue_model, seed=0),
}
