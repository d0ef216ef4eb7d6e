"""What the layers of several students see in the same images, beside each other."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from featurize.inspect import read_image
from featurize.stage import Job
from olavlm.data.corpus import Corpus
from olavlm.data.targets import TargetStore
from olavlm.errors import OlaError
from pipelines.see import Row, TaskView, choose, load_student, look, open_sources, predicts, stated_by

SEEN = 2  # images shown
STAGES = ("pretrain", "vpt", "finetune")


def layers(runs: Mapping[str, Path], keys: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """Images as the layers of every run's student see them: ``key`` and ``views`` of each; or why there are none.

    Args:
        runs: folders by what to call them. The images are of the first one's held-out data, or else of what it was
            trained on.
        keys: those of the images' samples; without any `SEEN`, evenly spread.

    Raises:
        OlaError: no image of such a key, or `keys` cannot be looked for.
    """
    models = {name: model for name, run in runs.items() if (model := _predicting(run))}
    if not models:
        return [], "no run has a student with predictors"
    try:
        shown, images = _images(runs[next(iter(models))], keys)
        seen = {}
        for name, model in models.items():
            student = load_student(model)
            seen[name] = look(student, images, open_sources(student[0], *stated_by(model.resolve().parent)))
    except OlaError as error:
        if keys:
            raise
        return [], str(error)
    tasks = list(dict.fromkeys(view.task for views in seen.values() for view in views[0]))
    return [
        {
            "key": key,
            "views": [
                view
                for task in tasks
                for view in beside({name: of for name, views in seen.items() for of in views[i] if of.task == task})
            ],
        }
        for i, key in enumerate(shown)
    ], ""


def beside(views: Mapping[str, TaskView]) -> list[TaskView]:
    """One task of one image in several runs: the target once, then every run's layers, as far as they are comparable.

    A run whose teacher is another one, or not at hand, has a view of its own.
    """
    (_, first), *_ = views.items()
    like = {name: view for name, view in views.items() if view is first or _comparable(view, first)}
    others = {name: view for name, view in views.items() if name not in like}
    targets = 0 if first.target is None else 1
    columns = first.columns[:targets]
    rows = [Row(row.what, row.tiles[:targets], row.smooth) for row in first.rows]
    for name, view in like.items():
        columns += [replace(column, name=f"{name}, {column.name}") for column in view.columns[targets:]]
        for row, own in zip(rows, view.rows, strict=True):
            row.tiles.extend(own.tiles[targets:])
    notes = list(dict.fromkeys(note for view in like.values() for note in view.notes))
    classes = {name: colour for view in like.values() for name, colour in view.classes.items()}
    joined = replace(first, columns=columns, rows=rows, notes=notes, classes=classes)
    return [joined, *(beside(others) if others else [])]


def _predicting(run: Path) -> Path | None:
    """The run's first student that was saved with predictors."""
    folders = (run / stage / "model" for stage in STAGES)
    return next((folder for folder in folders if folder.is_dir() and predicts(folder)), None)


def _images(run: Path, keys: Sequence[str]) -> tuple[list[str], list[Image.Image]]:
    """Keys and images of the run's held-out data, or else of what it was trained on."""
    for stage in ("probe", *STAGES):
        teachers, data = stated_by(run / stage)
        for name, entry in data.items():
            if entry.targets:
                corpus = Corpus.open(entry.corpus)
                store = TargetStore.open(entry.targets, corpus.id)
                job = Job(name, entry, corpus, {task: store.find(task, config) for task, config in teachers.items()})
                chosen = choose(job, keys, SEEN)
                return [stored.entry["key"] for stored in chosen], [read_image(job, stored) for stored in chosen]
    raise OlaError(f"{run}: no stage has data with targets")


def _comparable(view: TaskView, first: TaskView) -> bool:
    """Whether both have the very same target, which sets their colours, and the same kinds of pictures."""
    if view.target is None or first.target is None or not torch.equal(view.target, first.target):
        return False
    return [row.what for row in view.rows] == [row.what for row in first.rows]
