"""Looking at stored targets: maps decoded by the teachers' own heads, features as colours, nearest neighbours."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from featurize import teachers
from featurize.stage import Job, open_jobs
from featurize.teachers.base import Teacher
from olavlm.config import PipelineConfig
from olavlm.data import codec
from olavlm.data.corpus import Tar
from olavlm.data.images import apply_view, decode_image
from olavlm.errors import OlaError

Picture = np.ndarray[Any, Any]  # (side, side, 3) uint8
SIDE = 192
POOL = 1000  # images among which nearest neighbours are looked for

#: Anchors of the depth colour map, far to near (matplotlib's magma at 0, 1/4, 1/2, 3/4, 1).
_MAGMA = np.array([[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]], np.float64)


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
    pool = _committed(job)
    if not pool:
        raise OlaError(f"{job.data.targets}: no image has all targets ({', '.join(job.sets)}) yet")
    chosen = [pool[i] for i in np.linspace(0, len(pool) - 1, min(n, len(pool))).round().astype(int)]
    shown: list[dict[str, Any]] = [
        {"key": entry["key"], "image": _image(job, config, tar, entry)} for tar, entry, _ in chosen
    ]
    for task, stated in config.teachers.items():
        teacher = teachers.load(stated)
        features = torch.stack([_features(job, task, rows) for _, _, rows in chosen])
        maps = teacher.decode(features)
        for i, picture in enumerate(shown):
            if maps is not None:
                picture[task] = _coloured(maps[i].cpu(), teacher)
        if stated.grid > 1:
            for picture, colours in zip(shown, _principal(features, stated.grid), strict=True):
                picture[f"{task} features"] = colours
        else:
            for picture, (tar, entry, _) in zip(shown, _nearest(job, task, chosen, pool), strict=True):
                picture[f"{task} nearest"] = _image(job, config, tar, entry)
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


def _committed(job: Job) -> list[tuple[Tar, dict[str, Any], dict[str, dict[str, Any]]]]:
    """Images with every target: (tar, index row, commit row by task), `POOL` at most, from tars all over the corpus."""
    found: list[tuple[Tar, dict[str, Any], dict[str, dict[str, Any]]]] = []
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
                found.append((tars[i], entry, rows))
    return found[:POOL]


def _features(job: Job, task: str, rows: dict[str, dict[str, Any]]) -> Tensor:
    values, scales = job.sets[task].read(rows[task], rows[task]["key"])
    name = job.sets[task].identity.codec
    return codec.decode(torch.tensor(values), None if scales is None else torch.tensor(scales), name)


def _image(job: Job, config: PipelineConfig, tar: Tar, entry: dict[str, Any]) -> Picture:
    """The image in the view the first teacher saw."""
    image = decode_image(job.corpus.read(tar, entry["image_offset"], entry["image_bytes"]))
    view = next(iter(config.teachers.values())).view
    return np.asarray(apply_view(image, view, SIDE))


def _coloured(values: Tensor, teacher: Teacher) -> Picture:
    """A decoded map as colours: depth from far (dark) to near (bright), or one colour per label."""
    if not values.dtype.is_floating_point:
        palette = np.random.default_rng(7).integers(40, 255, (int(values.max()) + 1, 3), dtype=np.uint8)
        return _enlarged(palette[values.numpy()], Image.Resampling.NEAREST)
    low, high = values.quantile(0.02), values.quantile(0.98)
    level = ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).double().numpy()
    if teacher.depth_sign == "larger_is_farther":
        level = 1 - level
    anchors = np.linspace(0, 1, len(_MAGMA))
    colours = np.stack([np.interp(level, anchors, _MAGMA[:, channel]) for channel in range(3)], -1)
    return _enlarged(colours.round().astype(np.uint8), Image.Resampling.BILINEAR)


def _principal(features: Tensor, grid: int) -> list[Picture]:
    """Each image's tokens by the three directions of largest variance over all tokens shown."""
    tokens = features.flatten(0, 1).double()
    centred = tokens - tokens.mean(0)
    _, directions = torch.linalg.eigh(centred.T @ centred)
    projected = centred @ directions[:, -3:].flip(1)
    low, high = projected.quantile(0.02, dim=0), projected.quantile(0.98, dim=0)
    levels = ((projected - low) / (high - low).clamp_min(1e-12)).clamp(0, 1) * 255
    colours = levels.round().to(torch.uint8).reshape(len(features), grid, grid, 3).numpy()
    return [_enlarged(colour, Image.Resampling.NEAREST) for colour in colours]


def _nearest(job: Job, task: str, chosen: list[Any], pool: list[Any]) -> list[Any]:
    """For each chosen image the other one of the pool with the largest cosine between their targets."""
    stored = torch.stack([_features(job, task, rows).flatten() for _, _, rows in pool])
    stored = torch.nn.functional.normalize(stored, dim=-1)
    positions = [next(i for i, other in enumerate(pool) if other is one) for one in chosen]
    similarity = stored[positions] @ stored.T
    similarity[range(len(positions)), positions] = -2
    return [pool[int(i)] for i in similarity.argmax(-1)]


def _enlarged(picture: Picture, resample: Image.Resampling) -> Picture:
    return np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), resample))
