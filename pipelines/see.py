"""What a layer sees: the features predicted from its hidden states, shown as their teacher shows its own.

No architecture is known here. The student predicts, the teacher encodes and decodes, and a target store says which
images have similar targets.
"""

import errno
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from pydantic import ValidationError
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils.logging import disable_progress_bar
from yaml import YAMLError

from featurize import teachers
from featurize.drawing import Components, Picture, Scale, draw_labels, label_colour
from featurize.inspect import Gallery, Stored, read_image, show_image, spread, stored_images
from featurize.stage import Job
from featurize.teachers.base import Teacher
from olavlm.chat import load_image
from olavlm.config import DataConfig, TeacherConfig, View, load_pipeline
from olavlm.data.atomic import replace
from olavlm.data.corpus import Corpus
from olavlm.data.images import apply_view
from olavlm.data.targets import TargetStore
from olavlm.errors import OlaError
from olavlm.eval.maps import mean_iou, overlaps
from olavlm.model import OlaVlmConfig, OlaVlmForConditionalGeneration, OlaVlmProcessor, TaskConfig, cosine
from olavlm.model.export import load_for_inference
from pipelines.page import render
from train.probe import REQUEST

Student = tuple[OlaVlmForConditionalGeneration, OlaVlmProcessor]

#: The image and a request that says nothing of it, laid out as in training: predictors may read the text.
READ = f"the image and “{REQUEST}”"
NEAREST = 3
MAP = "decoded map"  # what a row of them is called


@dataclass(frozen=True)
class Source:
    """What a task's features can be shown with."""

    config: TeacherConfig | None
    teacher: Teacher | None = None
    gallery: Gallery | None = None  # pooled tasks only
    missing: tuple[str, ...] = ()  # what is not at hand, and why


@dataclass(frozen=True)
class Column:
    """The teacher's target, or a layer's prediction of it."""

    name: str
    features: Tensor  # (tokens, width) float32
    cosine: float | None = None  # to the target, where there is one


@dataclass(frozen=True)
class Tile:
    """A picture and what is said below it."""

    picture: Picture
    note: str = ""


@dataclass(frozen=True)
class Row:
    """The same kind of picture for every column."""

    what: str
    tiles: list[Tile]
    smooth: bool  # may be interpolated where it is shown larger


@dataclass
class TaskView:
    """One task of one image, as ``seen.html.j2`` lays it out."""

    task: str
    image: Picture
    columns: list[Column]
    rows: list[Row]
    notes: list[str]
    bar: dict[str, Any] = field(default_factory=dict)  # a float map's colours, and the values at their ends
    classes: dict[str, str] = field(default_factory=dict)  # names of the labels shown, with their CSS colours

    @property
    def target(self) -> Tensor | None:
        """The teacher's own features, those of the first column, if the teacher is at hand."""
        return self.columns[0].features if self.columns[-1].cosine is not None else None


def see(
    folder: Path,
    file: Path,
    pipeline: str | None = None,
    corpus: tuple[str, str] | None = None,
    out: Path | None = None,
) -> Path:
    """Write a page of what a student's supervised layers see in an image; progress goes to stderr.

    Args:
        folder: the student, saved with its predictors.
        file: the image.
        pipeline: whose teachers and data; default: those of the run that the folder lies in.
        corpus: a corpus and its target store, among whose images the nearest are looked for; default: the first data
            with targets.
        out: the page; default: ``see/<image>.html`` beside the student's folder.

    Returns:
        The page's path.

    Raises:
        OlaError: no student, or one without predictors; not an image; a teacher of other features than are predicted;
            a corpus or targets asked for that are not there. What is not asked for and not there is told in the page.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    image = load_image(file)
    student = load_student(folder)
    stated, data = stated_by(folder.resolve().parent, pipeline)
    sources = open_sources(student[0], stated, data, corpus)
    for task, source in sources.items():
        console.print(f"{task}: {'; '.join(source.missing) or 'teacher at hand'}", markup=False)
    (views,) = look(student, [image], sources)
    path = out or folder.resolve().parent / "see" / f"{file.stem}.html"
    page = render("see.html.j2", image=file.name, model=str(folder), read=READ, views=views)
    try:
        replace(path, page.encode())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # the command line has its own words for a full disk
        raise OlaError(f"{path}: cannot be written ({error.strerror}); name another file with --out") from None
    return path


def load_student(folder: Path) -> Student:
    """A student with its predictors, on the accelerator if there is one.

    Raises:
        OlaError: no student there, or one that predicts nothing.
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]
    model, processor = load_for_inference(folder, predictors=True)
    if not any(task.layers for task in model.config.task_configs):
        others = [path.parent for path in sorted(folder.resolve().parent.parent.glob("*/model/config.json"))]
        found = [str(other) for other in others if other != folder.resolve() and predicts(other)]
        hint = f"; {', '.join(found)} has some" if found else "; see one that was saved with them, as pretraining does"
        raise OlaError(f"{folder}: no predictors in this student, so its layers cannot be seen{hint}")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return model.to(device or "cpu"), processor  # type: ignore[arg-type]


def predicts(folder: Path) -> bool:
    """Whether the model there was saved with predictors."""
    try:
        return any(task.layers for task in OlaVlmConfig.from_pretrained(folder).task_configs)
    except (OlaError, OSError, ValueError):
        return False


def open_sources(
    model: OlaVlmForConditionalGeneration,
    stated: Mapping[str, TeacherConfig],
    data: Mapping[str, DataConfig],
    corpus: tuple[str, str] | None = None,
) -> dict[str, Source]:
    """By predicted task the teacher and, for pooled tasks, the images of a corpus; and what is not at hand.

    Args:
        model: the student.
        stated: a pipeline's teachers, by task.
        data: its data; pooled targets are those of the first with a store.
        corpus: a corpus and its store, to be used instead.

    Raises:
        OlaError: features that are no square grid, or not those of the teacher; no pooled targets in `corpus`.
    """
    tasks = [task for task in model.config.task_configs if task.layers]
    if corpus and not any(task.kind == "pooled" for task in tasks):
        raise OlaError(f"--corpus {corpus[0]}: the student predicts no pooled task to find images by")
    return {task.name: _open_source(task, stated.get(task.name), data, corpus, model.device) for task in tasks}


def stated_by(stage: Path, pipeline: str | None = None) -> tuple[dict[str, TeacherConfig], dict[str, DataConfig]]:
    """Teachers and data by the pipeline named, or by the configuration in a stage's folder, or none.

    Raises:
        OlaError: no such pipeline; the folder's ``config.yaml`` is not that of a stage with teachers and data.
    """
    if pipeline:
        config = load_pipeline(pipeline)
        return config.teachers, config.data
    file = stage / "config.yaml"
    if not file.is_file():
        return {}, {}
    try:
        found: Any = OmegaConf.to_container(OmegaConf.load(file))
        stated = {task: TeacherConfig.model_validate(entry) for task, entry in found["teachers"].items()}
        return stated, {name: DataConfig.model_validate(entry) for name, entry in found["data"].items()}
    except (YAMLError, OmegaConfBaseException, ValidationError, LookupError, TypeError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OlaError(f"{file}: not the configuration of a training stage ({reason}); give --pipeline") from None


def choose(job: Job, keys: Sequence[str], n: int) -> list[Stored]:
    """The images of samples with these keys, the first of a sample that has several; without keys `n`, evenly spread.

    Raises:
        OlaError: a key that no image with targets has, or no image with targets at all.
    """
    pool = stored_images(job)
    if not keys:
        return spread(pool, n)
    by_key = {stored.entry["key"]: stored for stored in reversed(pool)}
    if missing := [key for key in keys if key not in by_key]:
        near = (get_close_matches(missing[0], by_key, 1) or list(by_key)[-1:])[0]
        raise OlaError(f"--images {missing[0]}: no such key in {len(pool):,} images of data.{job.name}; {near} is one")
    return [by_key[key] for key in keys]


@torch.inference_mode()
def look(student: Student, images: Sequence[Image.Image], sources: Mapping[str, Source]) -> list[list[TaskView]]:
    """What every supervised layer sees in each image, task by task.

    Args:
        student: as `load_student` gives it.
        images: mode RGB, any size; the student's view and the teachers' are applied here.
        sources: `open_sources` of the student.
    """
    model, processor = student
    text = processor.prompt([{"from": "human", "value": f"<image>\n{REQUEST}"}])
    inputs = processor(images=images, text=[text] * len(images)).to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    predictions = model(**inputs, predict=True, logits_to_keep=1).predictions or {}
    return [
        [
            _view(
                task, {layer: of[i].float().cpu() for layer, of in predictions[task].items()}, image, source, processor
            )
            for task, source in sources.items()
        ]
        for i, image in enumerate(images)
    ]


def _view(
    task: str, predictions: Mapping[int, Tensor], image: Image.Image, source: Source, processor: OlaVlmProcessor
) -> TaskView:
    """One task of one image; predictions (tokens, width) by layer."""
    teacher, columns = source.teacher, []
    if teacher:
        target = teacher.encode(teacher.preprocess(image)[None]).float().cpu()[0]
        columns.append(Column("teacher's target", target))
    for layer, features in predictions.items():
        close = float(cosine(features[None], target[None])) if teacher else None
        columns.append(Column(f"layer {layer}", features, close))
    view: View = source.config.view if source.config else processor.view
    size = source.config.input_size if source.config else processor.image_size
    shown = TaskView(task, np.asarray(apply_view(image, view, size)), columns, [], list(source.missing))
    tokens = len(columns[0].features)
    if source.gallery:
        _add_nearest(shown, source.gallery, view)
    if teacher:
        _add_maps(shown, teacher)
    if tokens > 1:
        _add_components(shown, math.isqrt(tokens), fitted_on_target=teacher is not None)
    return shown


def _add_maps(shown: TaskView, teacher: Teacher) -> None:
    """The row of maps that the teacher's own head makes of the target, which comes first, and of the predictions."""
    maps = teacher.decode(torch.stack([column.features for column in shown.columns]))
    if maps is None:
        return
    smooth = maps.dtype.is_floating_point
    target, *predicted = (_draw_values if smooth else _draw_labels)(shown, maps.cpu(), teacher)
    shown.rows.append(Row(MAP, [Tile(target.picture), *predicted], smooth))


def _draw_values(shown: TaskView, maps: Tensor, teacher: Teacher) -> list[Tile]:
    """Float maps (n, H, W) on the scale of the first, and that scale as a bar of colours."""
    scale = Scale.of(maps[0], teacher.depth_sign == "larger_is_farther")
    unit = f" {teacher.depth_unit}" if teacher.depth_unit else ""
    far, near = ("far ", "near ") if teacher.depth_sign else ("", "")
    shown.bar |= {
        "colours": scale.bar(),
        "dark": f"{far}{scale.dark:.3g}{unit}",
        "bright": f"{near}{scale.bright:.3g}{unit}",
    }
    relative = "" if unit or not teacher.depth_sign else " Depth is relative: the numbers have no unit."
    shown.notes.append(f"Maps by the teacher's own head, coloured from the target's 2nd to 98th percentile.{relative}")
    return [Tile(scale.draw(one), f"off by {scale.distance(one, maps[0]):.0%} of the range") for one in maps]


def _draw_labels(shown: TaskView, maps: Tensor, teacher: Teacher) -> list[Tile]:
    """Maps of labels (n, H, W), and the names of all labels in them."""
    for label in sorted(set(maps.flatten().tolist())):
        red, green, blue = label_colour(label)
        shown.classes[teacher.labels.get(label, f"label {label}")] = f"rgb({red} {green} {blue})"
    shown.notes.append("Maps by the teacher's own decoder. mIoU: mean over the classes in either map.")
    target, *_ = arrays = maps.numpy()
    agreed = [mean_iou(overlaps(one, target, arrays.max() + 1)) for one in arrays]
    return [Tile(draw_labels(one), f"mIoU {of:.3f} to the target's") for one, of in zip(maps, agreed, strict=True)]


def _add_components(shown: TaskView, grid: int, fitted_on_target: bool) -> None:
    """The row of principal components, all columns on those of the first."""
    fitted = shown.columns[:1] if fitted_on_target else shown.columns
    components = Components.of(torch.stack([column.features for column in fitted]))
    tiles = [Tile(components.draw(column.features, grid)) for column in shown.columns]
    of = "the target's" if fitted_on_target else "the predictions'"
    shown.rows.append(Row(f"features: {of} first three principal components as red, green, blue", tiles, smooth=False))


def _add_nearest(shown: TaskView, gallery: Gallery, view: View) -> None:
    """Rows of the images whose stored targets are most similar, the most similar first."""
    found = [gallery.nearest(column.features, NEAREST) for column in shown.columns]
    for rank, ranked in enumerate(zip(*found, strict=True)):
        tiles = [
            Tile(show_image(read_image(gallery.job, stored), view), f"cosine {close:.3f}, {stored.entry['key']}")
            for stored, close in ranked
        ]
        shown.rows.append(Row(("nearest", "second", "third")[rank], tiles, smooth=True))
    shown.notes.append(
        f"Images with the most similar stored target among {len(gallery.pool):,} of {gallery.job.corpus.path}."
    )


def _open_source(
    task: TaskConfig,
    config: TeacherConfig | None,
    data: Mapping[str, DataConfig],
    corpus: tuple[str, str] | None,
    device: torch.device,
) -> Source:
    """See `open_sources`."""
    if task.kind == "dense" and math.isqrt(task.queries) ** 2 != task.queries:
        raise OlaError(f"task {task.name}: {task.queries} queries; only square grids can be drawn")
    if config is None:
        if corpus and task.kind == "pooled":
            raise OlaError(f"--corpus {corpus[0]}: no pipeline says what {task.name}'s teacher is; give --pipeline")
        return Source(None, missing=("No teacher is known: the student lies in no run, and no --pipeline names any.",))
    if (config.tokens, config.width) != (task.queries, task.width):
        raise OlaError(
            f"task {task.name}: the student predicts {task.queries} tokens of width {task.width}, "
            f"teachers.{task.name} gives {config.tokens} of width {config.width}"
        )
    teacher, gallery, missing = None, None, []
    try:
        teacher = teachers.load(config, str(device))
        _ = teacher.model  # now, not in the middle of drawing
    except (OlaError, OSError, SafetensorError) as error:
        teacher = None
        missing.append(f"No target and no map: {str(error).strip().splitlines()[0].rstrip('.')}.")
    if task.kind == "pooled":
        try:
            gallery = _open_gallery(task.name, config, data, corpus)
        except OlaError as error:
            if corpus:
                raise
            missing.append(f"No nearest images: {error}.")
    return Source(config, teacher, gallery, tuple(missing))


def _open_gallery(
    task: str, config: TeacherConfig, data: Mapping[str, DataConfig], corpus: tuple[str, str] | None
) -> Gallery:
    """The images with targets of a pooled task, of `corpus` or else of the first data with a store."""
    if corpus:
        entry = DataConfig(corpus=corpus[0], targets=corpus[1])
    else:
        stored = [entry for entry in data.values() if entry.targets]
        if not stored:
            raise OlaError("no data of the pipeline has targets")
        entry = stored[0]
    opened = Corpus.open(entry.corpus)
    found = TargetStore.open(str(entry.targets), opened.id).find(task, config)
    return Gallery(Job(task, entry, opened, {task: found}), task)
