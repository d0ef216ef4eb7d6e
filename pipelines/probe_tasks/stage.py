"""``python -m pipelines probe-tasks``: every student and layer that was probed, beside the teachers' own features."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from featurize import teachers as registry
from featurize.teachers.base import Teacher
from olavlm import runs
from olavlm.config import PipelineConfig, ProbeTasksConfig
from olavlm.data.atomic import replace
from olavlm.errors import OlaError
from olavlm.eval.bootstrap import LEVEL, Estimate
from pipelines.demo_world.truth import write_truth
from pipelines.probe_tasks.generation import ImageMeasures
from pipelines.probe_tasks.measures import Cell, MapMeasures, Source
from train.distributed import World
from train.probe import Probed, mean_targets


def probe_tasks(config: PipelineConfig) -> None:
    """Measure what is decoded from every probed layer; write ``probe_tasks/probe_tasks.json``.

    Beside the students stand ``target``, the teacher's own feature of the image through the same decoder, and
    ``floor``, the mean feature of the images that the probes were trained on. Stopped and started again, it goes on
    with the students that are missing. Generated images are kept in ``probe_tasks/images/<student>/<task>-<layer>``.

    Raises:
        OlaError: no `probe_tasks` section, probes that are not trained or of another configuration, truths that are
            missing or not as they should be, no teacher that decodes to what they are about.
    """
    settings = config.probe_tasks
    if settings is None or config.probe is None:
        raise OlaError(f"pipeline {config.name}: no `probe_tasks` section; expected one with pairs, labels or unclip")
    folder = runs.stage_dir(config, "probe_tasks")
    file = folder / "probe_tasks.json"
    if runs.begin(folder, runs.depends_on(config, "probe_tasks")):
        _print(json.loads(file.read_text()))
        return
    runs.require(config, "probe")
    for truth in dict.fromkeys(settings.folders.values()) if settings.scenes else ():
        if not Path(truth).exists():
            write_truth(Path(truth), settings.scenes or 0, config.seed, settings.level)

    device = World.join().device
    needed = dict.fromkeys([*config.probe.tasks, *config.student.encoders])
    teachers = {task: registry.load(config.teachers[task], str(device)) for task in needed}
    benches = _open(config, settings, {task: teachers[task] for task in config.probe.tasks}, folder / "images")
    result: dict[str, Any] = {"students": {}, "reference": {}, "measures": {}}
    for bench in benches:
        result["measures"] |= bench.described
    if file.exists():
        result = json.loads(file.read_text())
    if not result["reference"]:
        source = _reference(config, teachers)
        result["reference"] = {
            name: cell for bench in benches for name, cell in bench.measure("teacher", source).items()
        }
        replace(file, json.dumps(result, indent=2).encode())
    for student in config.probe.students:
        if student not in result["students"]:
            source = _student(config, student, teachers, device)
            found = {name: cell for bench in benches for name, cell in bench.measure(student, source).items()}
            result["students"][student] = found
            replace(file, json.dumps(result, indent=2).encode())
    _print(result)
    runs.finish(folder, {"students": [*result["students"]], "measures": [*result["measures"]]})


def _open(
    config: PipelineConfig, settings: ProbeTasksConfig, teachers: Mapping[str, Teacher], folder: Path
) -> list[MapMeasures | ImageMeasures]:
    """All that is to be measured, opened and checked before any student is."""
    benches: list[MapMeasures | ImageMeasures] = [MapMeasures(settings, teachers)] if settings.folders else []
    if settings.unclip:
        suited = {task: teacher for task, teacher in teachers.items() if teacher.config.teacher == "unclip"}
        if not suited:
            raise OlaError(f"probe_tasks.unclip: no teacher of probe.tasks ({', '.join(teachers)}) is unclip's")
        for task, teacher in suited.items():
            benches.append(ImageMeasures(settings.unclip, task, teacher, folder, settings.batch, config.seed))
    return benches


def _reference(config: PipelineConfig, teachers: Mapping[str, Teacher]) -> Source:
    """What the teachers make of images, and the mean feature."""
    assert config.probe
    tasks, means = config.probe.tasks, mean_targets(config)

    def source(images: list[Image.Image]) -> Iterator[tuple[str, str, Tensor]]:
        for task in tasks:
            target = _encode(teachers[task], images)
            yield task, "target", target
            yield task, "floor", means[task].to(target).expand_as(target)

    return source


def _student(config: PipelineConfig, name: str, teachers: Mapping[str, Teacher], device: torch.device) -> Source:
    """What a student's probes predict of images."""
    probed = Probed.load(config, name, device)

    def source(images: list[Image.Image]) -> Iterator[tuple[str, str, Tensor]]:
        fed = {encoder: _encode(teachers[encoder], images) for encoder in config.student.encoders}
        yield from probed.predict(probed.processor.pixel_values(images).to(device), fed)

    return source


def _encode(teacher: Teacher, images: list[Image.Image]) -> Tensor:
    """A teacher's features of images, (n, tokens, width) float32."""
    return teacher.encode(torch.stack([teacher.preprocess(image) for image in images]))


def _print(result: Mapping[str, Any]) -> None:
    """One table per measure: a row per layer, the students side by side, and what bounds them in the title."""
    for name, measure in result["measures"].items():
        bounds = ", ".join(f"{column} {_shown(cell)}" for column, cell in result["reference"][name].items())
        title = f"{measure['title']}, {measure['better']} is better ({bounds}; {LEVEL:.0%} intervals)"
        table = Table("layer", *result["students"], title=title, box=SIMPLE, padding=(0, 1, 0, 0))
        for layer in next(iter(result["students"].values()))[name]:
            table.add_row(layer, *(_shown(of[name][layer]) for of in result["students"].values()))
        Console().print(table)


def _shown(cell: Cell) -> str:
    if "low" not in cell:
        return f"{cell['value']:.3f}"
    return str(Estimate(cell["value"], cell["low"], cell["high"]))
