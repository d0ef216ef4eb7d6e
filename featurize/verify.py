"""Is every target there, of the right image, undamaged, and what the teacher would compute today?"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
import torch

from featurize import teachers
from featurize.progress import track
from featurize.stage import Job, open_jobs, rows
from olavlm.config import PipelineConfig
from olavlm.data import codec
from olavlm.data.commit import shard_index, shard_ranges, undescribed_arrays
from olavlm.data.corpus import Tar
from olavlm.data.images import decode_image
from olavlm.data.objects import AnyPath
from olavlm.data.targets import TargetSet
from olavlm.errors import OlaError, Unreadable

#: How far apart the same features may be on two kinds of hardware, in units in the last place (of the teacher's dtype)
#: of a token's largest value. Each adds up in its own order, and what is rounded differently in one layer goes through
#: all behind it: 24 blocks in bfloat16 end up to 6 units from float32. Another image is 50 to 300 of bfloat16's away;
#: float32's are so small that the quantization step decides.
NOISE = 16


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with one tar of one task, or with the whole set (no tar)."""

    data: str
    task: str
    tar: Tar | None
    what: str
    recomputed: bool = False  # only computing the target again can tell

    def __str__(self) -> str:
        where = f"{self.data}, {self.task}"
        return f"{where}, tar {self.tar.name}: {self.what}" if self.tar else f"{where}: {self.what}"


def verify(config: PipelineConfig, recompute: int = 0) -> Iterator[Finding]:
    """Check every target of the pipeline's stores; yields whatever is wrong.

    Args:
        config: the pipeline.
        recompute: so many images per task are run through the teacher again, on a GPU if featurizing uses one and one
            is here; they must agree with what is stored within one quantization step (int8, int4) or one unit in the
            last place of the largest value (fp16), or else within what the teacher's dtype leaves open (`NOISE`).
    """
    jobs = open_jobs(config)
    for task in config.teachers:
        chosen: list[tuple[Job, Tar, dict[str, Any]]] = []  # of all that were seen, each as likely as any other
        seen, rng = 0, random.Random(config.seed)
        for job in jobs:
            for file in undescribed_arrays(job.sets[task], rows(job.corpus, job.sets[task])):
                yield Finding(job.name, task, None, f"{file}: missing, damaged, or not of this set")
            for tar in track(job.corpus.tars, f"{job.name}, {task}"):
                found = list(verify_tar(job, task, tar))
                yield from found
                if recompute and not found:
                    commit = job.sets[task].commit(tar)
                    for row in [] if commit is None else commit.filter(pc.equal(commit["status"], "ok")).to_pylist():
                        place = seen if seen < recompute else rng.randrange(seen + 1)
                        seen += 1
                        if place < recompute:
                            chosen[place : place + 1] = [(job, tar, row)]
        if chosen:
            yield from _recomputed(config, task, chosen)


def verify_tar(job: Job, task: str, tar: Tar) -> Iterator[Finding]:
    """What is wrong with one tar of one task.

    Every committed row is compared with the corpus index (key, image index, image hash, order, completeness), its bytes
    with its checksum, and what any Zarr tool would read of its block with what the commit says.

    Raises:
        OlaError: the index or a target cannot be read.
    """
    target = job.sets[task]
    try:
        commit = target.commit(tar)
    except OlaError as error:
        yield Finding(job.name, task, tar, str(error))
        return
    if commit is None:
        there = " (there is a commit of another content of this tar)" if target.commit_file(tar).exists() else ""
        yield Finding(job.name, task, tar, f"not committed{there}, {tar.images} images without a target")
        return
    columns = ["key", "image_index", "image_hash"]
    if not commit.select(columns).equals(job.corpus.index(tar).select(columns)):
        yield Finding(job.name, task, tar, "the commit does not list the images of the corpus index")
        return
    listed = commit.to_pylist()
    for row in listed:
        if row["status"] == "ok":
            try:
                target.read(row, row["key"])
            except Unreadable:  # nothing that `repair` should take a commit back for
                raise
            except OlaError as error:
                yield Finding(job.name, task, tar, str(error))
    for block in sorted({row["block"] for row in listed if row["block"] >= 0}):
        for what in _block(target, block, [row for row in listed if row["block"] == block]):
            yield Finding(job.name, task, tar, what)


def _block(target: TargetSet, block: int, listed: list[dict[str, Any]]) -> Iterator[str]:
    """Whether the index at a shard's end says of every listed target what the commit says; nothing for a tar."""
    if target.format == "webdataset":
        return
    files = {"values": target.values_file(block)}
    if target.identity.layout.scales_dtype:
        files["scales"] = target.scales_file(block)
    for name, file in files.items():
        try:
            found = shard_ranges(_tail(file, len(shard_index(target.block, {}))))
        except FileNotFoundError:
            yield f"{file}: missing"
            continue
        except ValueError as error:
            yield f"{file}: {error}"
            continue
        places = {row["row"]: (row[f"{name}_offset"], row[f"{name}_bytes"]) for row in listed if row["status"] == "ok"}
        if any(found.get(row) != place for row, place in places.items()):
            yield f"{file}: its index places chunks elsewhere than the commit does"


def _tail(file: AnyPath, count: int) -> bytes:
    """The last bytes of a file."""
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - count))
        return opened.read()


def _recomputed(config: PipelineConfig, task: str, places: list[tuple[Job, Tar, dict[str, Any]]]) -> Iterator[Finding]:
    """Run images through the teacher again, in batches of the size they were computed in."""
    gpu = config.featurize.gpus_per_worker > 0 and torch.cuda.is_available()
    teacher = teachers.load(config.teachers[task], "cuda" if gpu else "cpu")
    noise = NOISE * torch.finfo(teacher.dtype).eps
    name = teacher.config.codec
    size = teacher.config.batch_size
    for start in range(0, len(places), size):
        batch = places[start : start + size]
        pixels = []
        for job, tar, row in batch:
            index = job.corpus.index(tar).to_pylist()
            entry = next(e for e in index if (e["key"], e["image_index"]) == (row["key"], row["image_index"]))
            data = job.corpus.read(tar, entry["image_offset"], entry["image_bytes"])
            pixels.append(teacher.preprocess(decode_image(data)))
        padding = [torch.zeros_like(pixels[0])] * (size - len(pixels))
        features = teacher.encode(torch.stack(pixels + padding)).cpu()
        for (job, tar, row), feature in zip(batch, features, strict=False):
            stored = codec.decode(*_tensors(*job.sets[task].read(row, row["key"])), name)
            values, scales = codec.encode(feature[None], name)
            now = _tensors(values[0], None if scales is None else scales[0])
            step = codec.step(*now, name).clamp_min(1e-30).expand_as(stored)
            allowed = (1.01 * step).maximum(noise * feature.abs().amax(-1, keepdim=True))
            off = (stored - codec.decode(*now, name)).abs()
            worst = (off / allowed).argmax()
            if off.view(-1)[worst] > allowed.view(-1)[worst]:
                steps, most = (float((x / step).view(-1)[worst]) for x in (off, allowed))
                what = f"sample {row['key']} is {steps:.1f} quantization steps off, {most:.1f} are tolerated"
                yield Finding(job.name, task, tar, what, recomputed=True)


def _tensors(values: Any, scales: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.tensor(values), None if scales is None else torch.tensor(scales)
