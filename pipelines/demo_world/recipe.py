"""The recipe for everything under `weights/`: three teachers and what the student starts from, from nothing.

Each training runs in a process and one thread of its own, two at a time: small matrices gain nothing from more threads.
"""

import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CLIPVisionModel, CLIPVisionModelWithProjection, PreTrainedModel
from transformers.utils import logging

from pipelines.demo_world import gates, train_clip, train_depth, train_language, train_segmentation
from pipelines.demo_world.build import Told, tell
from pipelines.demo_world.samples import SIZE, Samples, render_samples
from pipelines.demo_world.scenes import CLASSES

#: Scenes to train on, to test on, and to read about; steps of each training.
FULL = {"train": 16000, "test": 1024, "read": 1000, "depth": 1500, "seg": 2400, "student": 800, "gen": 600, "llm": 400}
QUICK = {"train": 128, "test": 256, "read": 40, "depth": 2, "seg": 3, "student": 2, "gen": 2, "llm": 2}

Numbers = dict[str, float]


@dataclass(frozen=True)
class Material:
    """What trainings are given."""

    train: Samples
    test: Samples
    told: list[Told]  # about scenes of `train`
    sizes: dict[str, int]


def train_all(out: Path, quick: bool = False) -> None:
    """Render, train, save in the hub's own layouts, print what was measured, and write it into ``out/MODEL_CARD.md``.

    Args:
        out: gets ``depth/``, ``seg/``, ``gen/``, ``student/vision/``, ``student/llm/``; files there are replaced.
        quick: a few steps each; shows that the recipe runs, not what it can do.
    """
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    sizes = QUICK if quick else FULL
    told = [t for chunk in tell("teachers", sizes["read"], 0, 2) for t in chunk]
    material = Material(render_samples("teachers", sizes["train"]), render_samples("gates", sizes["test"]), told, sizes)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        running = {name: pool.submit(job, material, out) for name, job in JOBS.items()}
        measured = {name: future.result() for name, future in running.items()}
    measured["gen"] |= gates.generation(
        CLIPVisionModelWithProjection.from_pretrained(out / "gen" / "image_encoder", dtype=torch.float32),
        CLIPVisionModel.from_pretrained(out / "student" / "vision", dtype=torch.float32),
        material.test,
    )
    card = model_card(out, measured, sizes, time.monotonic() - start)
    (out / "MODEL_CARD.md").write_text(card)
    print(card)


def _one_thread() -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def depth_teacher(material: Material, out: Path) -> Numbers:
    """``depth/``: DepthAnything."""
    model, seconds = train_depth.train(material.train, material.sizes["depth"])
    _save(model, out / "depth")
    processor = _processor("DPTImageProcessor", SIZE, 3, train_depth.MEAN, train_depth.STD)
    _write(out / "depth", {**processor, "keep_aspect_ratio": False, "ensure_multiple_of": train_depth.PATCH})
    return {"seconds": seconds, **gates.depth(model, material.test)}


def segmentation_teacher(material: Material, out: Path) -> Numbers:
    """``seg/``: OneFormer with its processor and tokenizer."""
    model, seconds = train_segmentation.train(material.train, material.sizes["seg"])
    folder = out / "seg"
    _save(model, folder)
    train_segmentation.tokenizer().save_pretrained(folder)
    things = [i for i, name in enumerate(CLASSES) if name not in ("floor", "wall")]
    names = {"class_names": list(CLASSES), "thing_ids": things, **{str(i): name for i, name in enumerate(CLASSES)}}
    side, length = train_segmentation.INPUT, train_segmentation.TASK_LENGTH
    processor = {
        **_processor("OneFormerImageProcessor", side, 2, train_segmentation.MEAN, train_segmentation.STD),
        "class_info_file": "",  # a file on the hub, elsewhere; here `metadata` says it all
        "metadata": names,
        "num_labels": len(CLASSES),
        "num_text": train_segmentation.QUERIES,
    }
    _write(folder, processor)
    lengths = {"processor_class": "OneFormerProcessor", "max_seq_length": length, "task_seq_length": length}
    (folder / "processor_config.json").write_text(json.dumps(lengths, indent=2) + "\n")
    return {"seconds": seconds, **gates.segmentation(model, material.test)}


def generation_teacher(material: Material, out: Path) -> Numbers:
    """``gen/``: the image encoder of an unCLIP, a CLIP that shares nothing with the student's."""
    words = train_language.make_tokenizer(material.told)
    steps = material.sizes["gen"]
    model, seconds = train_clip.train(
        "gen", material.train, words, steps, patch=16, captioning=False, batch=128, seed=2
    )
    encoder = CLIPVisionModelWithProjection(model.vision_model.config)
    encoder.vision_model.load_state_dict(model.vision_model.state_dict())
    encoder.visual_projection.load_state_dict(model.visual_projection.state_dict())
    _save(encoder, out / "gen" / "image_encoder")
    _write(out / "gen" / "feature_extractor", _clip_processor())
    return {"seconds": seconds, "recall_at_1_of_256": train_clip.recall(model, material.test, words)}


def student_tower(material: Material, out: Path) -> Numbers:
    """``student/vision/``: the student's CLIP tower."""
    words = train_language.make_tokenizer(material.told)
    steps = material.sizes["student"]
    model, seconds = train_clip.train(
        "student", material.train, words, steps, patch=8, captioning=True, batch=64, seed=1
    )
    tower = CLIPVisionModel(model.vision_model.config)
    tower.load_state_dict(model.vision_model.state_dict())
    _save(tower, out / "student" / "vision")
    _write(out / "student" / "vision", _clip_processor())
    recall = train_clip.recall(model, material.test, words)
    return {"seconds": seconds, "recall_at_1_of_256": recall, **gates.tower(tower, material.test)}


def language_model(material: Material, out: Path) -> Numbers:
    """``student/llm/``: a Llama and its tokenizer."""
    words = train_language.make_tokenizer(material.told)
    model, seconds, perplexity = train_language.train(material.told, words, material.sizes["llm"])
    _save(model, out / "student" / "llm")
    words.save_pretrained(out / "student" / "llm")
    return {"seconds": seconds, "perplexity": perplexity}


#: The longest first.
JOBS = {
    "seg": segmentation_teacher,
    "student": student_tower,
    "depth": depth_teacher,
    "gen": generation_teacher,
    "llm": language_model,
}


def _save(model: PreTrainedModel, folder: Path) -> None:
    """Store in half precision; `model` itself goes on in float32 with exactly the stored values."""
    model.half().save_pretrained(folder)  # type: ignore[no-untyped-call]
    model.float()  # type: ignore[no-untyped-call]


def _processor(kind: str, size: int, resample: int, mean: list[float], std: list[float]) -> dict[str, Any]:
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


def _clip_processor() -> dict[str, Any]:
    crop = {"do_center_crop": True, "crop_size": {"height": SIZE, "width": SIZE}, "do_convert_rgb": True}
    plain = _processor("CLIPImageProcessor", SIZE, 3, train_clip.MEAN, train_clip.STD)
    return {**plain, **crop, "size": {"shortest_edge": SIZE}}


def _write(folder: Path, processor: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def model_card(out: Path, measured: dict[str, Numbers], sizes: dict[str, int], seconds: float) -> str:
    """Markdown: what lies in `out`, how large, how trained, what was measured."""
    rows = []
    for name, folder in FOLDERS.items():
        size = sum(f.stat().st_size for f in (out / folder).rglob("*") if f.is_file())
        rows.append(
            f"| `{folder}` | {ABOUT[name]} | {size / 1e6:.2f} | {sizes[name]} | {measured[name]['seconds']:.0f} |"
        )
    numbers = []
    for name, found in measured.items():
        numbers += [f"| `{FOLDERS[name]}` | {key} | {value:.3f} |" for key, value in found.items() if key != "seconds"]
    return CARD.format(
        rows="\n".join(rows),
        numbers="\n".join(numbers),
        minutes=seconds / 60,
        train=sizes["train"],
        test=sizes["test"],
        torch=torch.__version__,
        transformers=transformers.__version__,
        total=sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6,
    )


FOLDERS = {"depth": "depth", "seg": "seg", "gen": "gen", "student": "student/vision", "llm": "student/llm"}
ABOUT = {
    "depth": "`DepthAnythingForDepthEstimation`, Dinov2 96 wide, 4 layers, patch 8, 64 px; metric: larger is farther",
    "seg": "`OneFormerForUniversalSegmentation`, Swin-24 (last stage 192 wide), patch 4, 128 px",
    "gen": "`CLIPVisionModelWithProjection`, 96 wide, 4 layers, patch 16, 64 px",
    "student": "`CLIPVisionModel`, 96 wide, 4 layers, patch 8, 64 px: 64 patches",
    "llm": "`LlamaForCausalLM`, 128 wide, 4 layers, word-level tokenizer",
}
CARD = """# Weights of the demo world

Small models of the real architectures, in the hub's own folder layouts, trained from nothing on {train} rendered
scenes by `python -m pipelines teachers`. They know this world only. Apache-2.0, as the code.

| folder | what | MB | steps | CPU seconds |
|---|---|---|---|---|
{rows}

{total:.2f} MB in all, float16 safetensors. Two trainings at a time, one thread each: {minutes:.0f} minutes on two cores
(torch {torch}, transformers {transformers}).

Measured on {test} other scenes, with the stored weights:

| folder | what | value |
|---|---|---|
{numbers}

- `delta1`: share of pixels whose depth is within a factor of 1.25; `_from_target`: by the teacher's own head from
  the stored target alone. `probe_r2`: ridge regression from the target, averaged over an object's pixels, to the
  object's log-depth; `_tower`: the same from the student's tower; `_boxes`: from 2-D box position and size.
- `miou`: seven classes, 64 px; `_from_target`: by the teacher's own decoders from the stored target alone.
- `recall_at_1_of_256`: an image's own caption among 256. `r2_from_tower`: how much of the generation target a linear
  map from the student's own image embedding explains; near 1 the target would be trivial.
- `perplexity`: per token, on held-out text.

Image mean and standard deviation: ImageNet's for `depth` and `seg`, CLIP's for `gen` and `student/vision`.
"""
