"""Is every target there, of the right image, undamaged, and what the teacher would compute today?"""

import random
from collections.abc import Iterator
from typing import Any

import torch

from featurize import teachers
from featurize.stage import Job, open_jobs
from olavlm.config import PipelineConfig
from olavlm.data import codec
from olavlm.data.corpus import Tar
from olavlm.data.images import decode_image
from olavlm.errors import OlaError

Place = tuple[Job, str, Tar, dict[str, Any]]  # an image's row in the commit of a task


def verify(config: PipelineConfig, recompute: int = 0) -> Iterator[str]:
    """Check every target of the pipeline's stores; yields one line per thing that is wrong.

    Every committed row is compared with the corpus index (key, image index, image hash, order, completeness) and its
    bytes with its checksum. Tars without a commit are named too.

    Args:
        config: the pipeline.
        recompute: so many images per task are run through the teacher again; they must agree with what is stored within
            one quantization step (int8, int4) or one unit in the last place of the largest value (fp16).
    """
    jobs = open_jobs(config)
    places: dict[str, list[Place]] = {task: [] for task in config.teachers}
    for job in jobs:
        for task in config.teachers:
            for tar in job.corpus.tars:
                yield from _tar(job, task, tar, places[task])
    for task, found in places.items():
        chosen = random.Random(config.seed).sample(found, min(recompute, len(found)))
        if chosen:
            yield from _recomputed(config, task, chosen)


def _tar(job: Job, task: str, tar: Tar, places: list[Place]) -> Iterator[str]:
    """What is wrong with one tar of one task; images that are fine are appended to `places`."""
    target = job.sets[task]
    where = f"{job.name}, {task}, tar {tar.name}"
    try:
        commit = target.commit(tar)
    except OlaError as error:
        yield f"{where}: {error}"
        return
    if commit is None:
        other = " (there is a commit of another content of this tar)" if target.commit_file(tar).exists() else ""
        yield f"{where}: not committed{other}, {tar.images} images without a target"
        return
    columns = ["key", "image_index", "image_hash"]
    if not commit.select(columns).equals(job.corpus.index(tar).select(columns)):
        yield f"{where}: the commit does not list the images of the corpus index"
        return
    for row in commit.to_pylist():
        if row["status"] != "ok":
            continue
        try:
            target.read(row, row["key"])
        except OlaError as error:
            yield f"{where}: {error}"
        else:
            places.append((job, task, tar, row))


def _recomputed(config: PipelineConfig, task: str, places: list[Place]) -> Iterator[str]:
    """Run images through the teacher again, in batches of the size they were computed in."""
    teacher = teachers.load(config.teachers[task])
    name = teacher.config.codec
    size = teacher.config.batch_size
    for start in range(0, len(places), size):
        batch = places[start : start + size]
        pixels = []
        for job, _, tar, row in batch:
            index = job.corpus.index(tar).to_pylist()
            entry = next(e for e in index if (e["key"], e["image_index"]) == (row["key"], row["image_index"]))
            data = job.corpus.read(tar, entry["image_offset"], entry["image_bytes"])
            pixels.append(teacher.preprocess(decode_image(data)))
        padding = [torch.zeros_like(pixels[0])] * (size - len(pixels))
        features = teacher.encode(torch.stack(pixels + padding))
        for (job, _, tar, row), feature in zip(batch, features, strict=False):
            stored = codec.decode(*_tensors(*job.sets[task].read(row, row["key"])), name)
            values, scales = codec.encode(feature[None], name)
            now = _tensors(values[0], None if scales is None else scales[0])
            step = codec.step(*now, name).clamp_min(1e-30)
            off = float(((stored - codec.decode(*now, name)).abs() / step).max())
            if off > 1.01:
                yield f"{job.name}, {task}, tar {tar.name}, sample {row['key']}: {off:.1f} quantization steps off"


def _tensors(values: Any, scales: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.tensor(values), None if scales is None else torch.tensor(scales)
