"""Maps decoded from features, measured against pairs of points, label maps and depth maps."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from rich.progress import track
from torch import Tensor

from featurize.teachers.base import Teacher
from olavlm.chat import load_image
from olavlm.config import ProbeTasksConfig
from olavlm.data.images import view_positions
from olavlm.errors import OlaError
from olavlm.eval.bootstrap import Estimate, bootstrap, ratio
from olavlm.eval.maps import absolute_relative_error, depth_order, mean_iou, overlaps, read_map
from olavlm.eval.truth import Array, Pairs, load_maps, load_pairs, read_depths, read_labels

Size = tuple[int, int]  # width and height of an image
#: Features of images as (task, column, (n, tokens, width)); a column is a student's layer, or what it is held against.
Source = Callable[[list[Image.Image]], Iterator[tuple[str, str, Tensor]]]
Cell = dict[str, float]
Found = dict[str, dict[str, Cell]]  # measure → column → cell


@dataclass(frozen=True)
class Measure:
    """How well the maps of a task agree with what is known of some images."""

    task: str
    title: str
    better: Literal["higher", "lower"]
    truths: Mapping[Path, Any]  # image file → what is known of it
    judge: Callable[[Tensor, Size, Any], Array]  # a map, the image's size, the truth → what adds up over images
    of_sums: Callable[[Array], Array]  # sums of that → the measure


class MapMeasures:
    """All that the folders of a `probe_tasks` section and the probed tasks' teachers give to measure of maps.

    Raises:
        OlaError: a folder that is not as `olavlm.eval.truth` has it, or whose kind no teacher decodes to.
    """

    def __init__(self, settings: ProbeTasksConfig, teachers: Mapping[str, Teacher]) -> None:
        self._teachers, self._batch = teachers, settings.batch
        self._measures: dict[str, Measure] = {}
        for key, folder in settings.folders.items():
            make, needed = _MAKERS[key]
            suited = {task: teacher for task, teacher in teachers.items() if _decodes_to(key, teacher)}
            if not suited:
                raise OlaError(f"probe_tasks.{key}: no teacher of probe.tasks ({', '.join(teachers)}) gives {needed}")
            for task, teacher in suited.items():
                name, measure = make(task, teacher, folder, settings.ignore)
                self._measures[name] = measure

    @property
    def described(self) -> dict[str, dict[str, str]]:
        """Title and direction of every measure, by name."""
        return {name: {"title": m.title, "better": m.better} for name, m in self._measures.items()}

    def measure(self, name: str, source: Source) -> Found:
        """What is measured of a source's features; an image that several measures are about is looked at once."""
        files = [*dict.fromkeys(file for measure in self._measures.values() for file in measure.truths)]
        added: dict[str, dict[str, list[Array]]] = {key: {} for key in self._measures}
        for chunk in chunks(files, self._batch, f"maps {name}"):
            images = [load_image(file) for file in chunk]
            for task, column, features in source(images):
                about = {key: measure for key, measure in self._measures.items() if measure.task == task}
                maps = self._teachers[task].decode(features) if about else None
                if maps is None:
                    continue
                for file, image, decoded in zip(chunk, images, maps.cpu(), strict=True):
                    for key, measure in about.items():
                        if file in measure.truths:
                            judged = measure.judge(decoded, image.size, measure.truths[file])
                            added[key].setdefault(column, []).append(judged)
        return {
            key: {column: self._cell(key, values) for column, values in columns.items()}
            for key, columns in added.items()
        }

    def _cell(self, key: str, per_image: list[Array]) -> Cell:
        estimate = bootstrap(per_image, self._measures[key].of_sums)
        if math.isnan(estimate.value):
            raise OlaError(f"probe_tasks: {key}: nothing is known of any pixel of the {len(per_image)} images")
        return as_cell(estimate, len(per_image))


def as_cell(estimate: Estimate, n: int) -> Cell:
    """An estimate over n images, as it is written."""
    return {**asdict(estimate), "n": n}


def chunks(files: Sequence[Path], size: int, what: str) -> Iterator[list[Path]]:
    """The files, `size` at a time, with a progress bar."""
    yield from track([[*files[i : i + size]] for i in range(0, len(files), size)], what, disable=not files)


def _decodes_to(key: str, teacher: Teacher) -> bool:
    """Whether a teacher's maps can be held against the truths of a key."""
    return bool({"pairs": teacher.depth_sign, "labels": teacher.labels, "depths": teacher.depth_unit == "m"}[key])


def _order(task: str, teacher: Teacher, folder: str, _: int) -> tuple[str, Measure]:
    def judge(decoded: Tensor, size: Size, pairs: Pairs) -> Array:
        first, second = (read_map(decoded, _positions(teacher, at, size)) for at in (pairs.first, pairs.second))
        return depth_order(first, second, pairs.first_is_closer, teacher.depth_sign == "larger_is_closer")

    title = f"{task}: pairs of points in the right order"
    return f"{task}_order", Measure(task, title, "higher", load_pairs(folder), judge, ratio)


def _miou(task: str, teacher: Teacher, folder: str, ignore: int) -> tuple[str, Measure]:
    known = {*teacher.labels}

    def judge(decoded: Tensor, size: Size, file: Path) -> Array:
        predicted = read_map(decoded, _positions(teacher, _pixels(size), size))
        return overlaps(predicted, read_labels(file, known, ignore), max(known) + 1, ignore)

    title = f"{task}: mIoU of the label maps"
    return f"{task}_miou", Measure(task, title, "higher", load_maps(folder, "labels"), judge, mean_iou)


def _error(task: str, teacher: Teacher, folder: str, _: int) -> tuple[str, Measure]:
    def judge(decoded: Tensor, size: Size, file: Path) -> Array:
        predicted = read_map(decoded, _positions(teacher, _pixels(size), size))
        return absolute_relative_error(predicted, read_depths(file))

    title = f"{task}: mean relative error of the depth"
    return f"{task}_absrel", Measure(task, title, "lower", load_maps(folder, "depths"), judge, ratio)


def _positions(teacher: Teacher, points: Array, size: Size) -> Array:
    """Where points of an image are in the teacher's map of it."""
    return view_positions(points, size, teacher.config.view, teacher.config.input_size)


def _pixels(size: Size) -> Array:
    """The centres of an image's pixels, (H, W, 2) x, y."""
    width, height = size
    return np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1)


#: What makes the measure of a key, and what its teacher has to decode to.
_MAKERS = {"pairs": (_order, "depth"), "labels": (_miou, "labels"), "depths": (_error, "depth in metres")}
