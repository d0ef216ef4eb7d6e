"""Looking at stored targets: maps decoded by the teachers' own heads, features as colours, nearest neighbours."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from featurize import teachers
from featurize.drawing import Components, Picture, Scale, draw_labels
from featurize.stage import Job, open_jobs
from featurize.teachers.base import Teacher
from olavlm.config import PipelineConfig, View
from olavlm.data import codec
from olavlm.data.corpus import Tar
from olavlm.data.images import apply_view, decode_image
from olavlm.errors import OlaError

SIDE = 192
POOL = 10_000  # images shown are chosen among, and at most this many are compared with


class Stored(NamedTuple):
    """An image of a corpus with its targets."""

    tar: Tar
    entry: dict[str, Any]  # row of the tar's index
    rows: dict[str, dict[str, Any]]  # row of the commit, by task


def pictures(config: PipelineConfig, data: str, n: int = 8) -> list[dict[str, Any]]:
    """Some images of a `data` entry, spread over the corpus, beside what is stored about them.

    Returns:
        Per image: ``key``, ``image``, and for each task what can be shown of it, (192, 192, 3) uint8 RGB each:
        ``<task>``, the decoded map (depth: near is bright; labels: a colour each); ``<task> features``, the first three
        principal components over all the images shown; ``<task> nearest``, for pooled targets, the image with the most
        similar target.

    Raises:
        OlaError: no such entry, nothing committed in it, or a teacher's weights are missing.
    """
    job = next((job for job in open_jobs(config) if job.name == data), None)
    if job is None:
        raise OlaError(f"pipeline {config.name}: data.{data} is not there or has no targets")
    view = next(iter(config.teachers.values())).view  # the one the first teacher saw
    pool = stored_images(job)
    chosen = spread(pool, n)
    shown: list[dict[str, Any]] = [
        {"key": stored.entry["key"], "image": show_image(read_image(job, stored), view)} for stored in chosen
    ]
    for task, stated in config.teachers.items():
        teacher = teachers.load(stated)
        features = read_features(job, task, chosen)
        maps = teacher.decode(features)
        for i, picture in enumerate(shown):
            if maps is not None:
                picture[task] = _draw_map(maps[i], teacher)
        if stated.grid > 1:
            components = Components.of(features)
            for picture, of_image in zip(shown, features, strict=True):
                colours = components.draw(of_image, stated.grid)
                picture[f"{task} features"] = _enlarged(colours, Image.Resampling.NEAREST)
        else:
            gallery = Gallery(job, task, pool)
            for picture, stored, of_image in zip(shown, chosen, features, strict=True):
                found = [other for other, _ in gallery.nearest(of_image, 2) if other is not stored]
                other = found[0] if found else stored  # itself where it is alone
                picture[f"{task} nearest"] = show_image(read_image(job, other), view)
    return shown


def save(shown: list[dict[str, Any]], file: Path) -> None:
    """The pictures as one PNG: a row per image, a column per kind, kinds named on top."""
    names = [name for name in shown[0] if name != "key"]
    gap, top = 4, 16
    sheet = Image.new("RGB", (len(names) * (SIDE + gap) - gap, top + len(shown) * (SIDE + gap) - gap), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(names):
        draw.text((column * (SIDE + gap) + 2, 2), name, fill="black")
        for row, picture in enumerate(shown):
            sheet.paste(Image.fromarray(picture[name]), (column * (SIDE + gap), top + row * (SIDE + gap)))
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)


class Gallery:
    """Images of a corpus, to be found by their stored targets of a pooled task."""

    def __init__(self, job: Job, task: str, pool: list[Stored] | None = None) -> None:
        self.job = job
        self.pool = stored_images(job) if pool is None else pool
        self._targets = F.normalize(read_features(job, task, self.pool).flatten(1), dim=-1)

    def nearest(self, features: Tensor, n: int) -> list[tuple[Stored, float]]:
        """The `n` images whose targets have the largest cosine to features (1, width), and that cosine; best first."""
        cosines = self._targets @ F.normalize(features.float().cpu().flatten(), dim=0)
        best = cosines.argsort(descending=True, stable=True)[:n]
        return [(self.pool[i], float(cosines[i])) for i in best.tolist()]


def stored_images(job: Job) -> list[Stored]:
    """Images that have every target of the job, `POOL` at most, from tars all over the corpus.

    Raises:
        OlaError: there is none.
    """
    found: list[Stored] = []
    tars = job.corpus.tars
    per_tar = max(1, sum(tar.images for tar in tars) // max(1, len(tars)))
    count = min(len(tars), -(-POOL // per_tar))
    for i in np.linspace(0, len(tars) - 1, count).round().astype(int) if count else []:
        commits = {task: target.commit(tars[i]) for task, target in job.sets.items()}
        if any(commit is None for commit in commits.values()):
            continue
        columns = {task: commit.to_pylist() for task, commit in commits.items() if commit is not None}
        for position, entry in enumerate(job.corpus.index(tars[i]).to_pylist()):
            rows = {task: column[position] for task, column in columns.items()}
            if all(row["status"] == "ok" for row in rows.values()):
                found.append(Stored(tars[i], entry, rows))
    if not found:
        raise OlaError(f"{job.data.targets}: no image has all targets ({', '.join(job.sets)}) yet")
    return found[:POOL]


def spread(pool: list[Stored], n: int) -> list[Stored]:
    """`n` of them at most, evenly spread from the first to the last."""
    return [pool[i] for i in np.linspace(0, len(pool) - 1, min(n, len(pool))).round().astype(int)]


def read_features(job: Job, task: str, images: list[Stored]) -> Tensor:
    """Their stored targets of a task, (n, tokens, width) float32."""
    target, found = job.sets[task], []
    for image in images:
        values, scales = target.read(image.rows[task], image.entry["key"])
        scaled = None if scales is None else torch.tensor(scales)
        found.append(codec.decode(torch.tensor(values), scaled, target.identity.codec))
    return torch.stack(found)


def read_image(job: Job, stored: Stored) -> Image.Image:
    """The image itself, mode RGB."""
    return decode_image(job.corpus.read(stored.tar, stored.entry["image_offset"], stored.entry["image_bytes"]))


def show_image(image: Image.Image, view: View) -> Picture:
    """An image in a view, (192, 192, 3)."""
    return np.asarray(apply_view(image, view, SIDE))


def _draw_map(decoded: Tensor, teacher: Teacher) -> Picture:
    """A decoded map on a scale of its own, (192, 192, 3)."""
    if not decoded.dtype.is_floating_point:
        return _enlarged(draw_labels(decoded), Image.Resampling.NEAREST)
    scale = Scale.of(decoded, teacher.depth_sign == "larger_is_farther")
    return _enlarged(scale.draw(decoded), Image.Resampling.BILINEAR)


def _enlarged(picture: Picture, resample: Image.Resampling) -> Picture:
    return np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), resample))
