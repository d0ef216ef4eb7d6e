"""Images, text and targets joined into tars that any WebDataset loader reads, without this package.

Per sample, beside each other: ``{key}.jpg`` (the encoded image, untouched, with the extension its bytes call for) or
``{key}.0.jpg``, ``{key}.1.jpg`` … of several; ``{key}.json`` or ``{key}.txt`` as in the corpus; and
``{key}.{task}.npy`` or ``{key}.0.{task}.npy`` …: the dequantized features, float16 (tokens, width), tokens row by row
over the teacher's grid. An image without a target of a task has no such member.

A tar of the corpus becomes a tar of the same name: same commits, same bytes. What is there is not made again, unless
failed images have got their targets since: the header of a tar's first member says which commits it is of.
"""

import io
import json
import os
import secrets
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featurize.progress import track
from featurize.stage import Job, open_jobs
from olavlm.config import PipelineConfig
from olavlm.data import codec
from olavlm.data.atomic import ensure, sweep
from olavlm.data.corpus import Tar, content_hash
from olavlm.data.folder import fsync
from olavlm.data.targets import TargetSet
from olavlm.errors import OlaError

_COMMITS = "OLAVLM.commits"  # pax keyword: the `content_hash` of every task's commit
_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"GIF8": "gif", b"BM": "bmp"}


def export(config: PipelineConfig, data: str, out: Path) -> Iterator[str]:
    """Write ``out/<tar>.tar`` for every tar of a `data` entry, and ``out/export.json``, which says of what.

    Yields:
        One line per tar that could not be exported because some task has no commit of it.

    Raises:
        OlaError: no such entry; `out` holds an export of something else; an image or a target that is damaged, or that
            float16 cannot hold.
    """
    job = next((job for job in open_jobs(config) if job.name == data), None)
    if job is None:
        raise OlaError(f"pipeline {config.name}: data.{data} is not there or has no targets")
    _claim(out, {"corpus": job.corpus.id, "targets": {task: target.path.name for task, target in job.sets.items()}})
    with ThreadPoolExecutor(config.featurize.decode_threads, "export") as pool:
        tars = job.corpus.tars
        sweep(*(out / f"{tar.name}.tar" for tar in tars))  # what killed exports left
        committed = {task: there["content"].to_pylist() for task, there in job.committed().items()}
        contents = [{task: content[i] for task, content in committed.items()} for i in range(len(tars))]
        futures = [pool.submit(_export_tar, job, tar, out, of_tar) for tar, of_tar in zip(tars, contents, strict=True)]
        try:
            for tar, future in track(list(zip(tars, futures, strict=True)), f"export {data}"):
                if lacking := future.result():
                    yield f"tar {tar.name}: not featurized by {', '.join(lacking)}"
        finally:
            for future in futures:
                future.cancel()


def _claim(out: Path, content: dict[str, Any]) -> None:
    """Say what the folder is an export of; refused if it is one of something else."""
    file = out / "export.json"
    ensure(file, json.dumps(content, indent=2).encode())
    if (found := json.loads(file.read_text())) != content:
        raise OlaError(f"{file}: an export of {found}, not of {content}; give another folder")


def _export_tar(job: Job, tar: Tar, out: Path, contents: dict[str, str | None]) -> list[str]:
    """Write one tar, a sample at a time in memory, unless it is there.

    Args:
        job: what is exported.
        tar: of its corpus.
        out: the folder.
        contents: the `content_hash` of every task's commit of the tar.

    Returns:
        The tasks that have no commit of it, if so; nothing was written then.
    """
    path, note = out / f"{tar.name}.tar", {_COMMITS: json.dumps(contents, sort_keys=True)}
    if lacking := [task for task, content in contents.items() if content is None]:
        return lacking
    if _noted(path).items() >= note.items():
        return []
    commits = {task: target.commit(tar, contents[task]) for task, target in job.sets.items()}
    rows = {task: commit.to_pylist() for task, commit in commits.items() if commit is not None}
    if lacking := [task for task in commits if task not in rows]:  # withdrawn meanwhile
        return lacking
    index = job.corpus.index(tar).to_pylist()
    temporary = out / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        with tarfile.open(temporary, "x", format=tarfile.PAX_FORMAT) as file:
            for position, entry in enumerate(index):
                last = position + 1 == len(index) or index[position + 1]["key"] != entry["key"]
                number = "" if entry["image_index"] == 0 and last else f".{entry['image_index']}"
                if entry["image_index"] >= 0:
                    image = job.corpus.read(tar, entry["image_offset"], entry["image_bytes"])
                    _add(file, f"{entry['key']}{number}.{_extension(image)}", image, note)
                    stored = {task: of_tar[position] for task, of_tar in rows.items()}
                    stored = {task: row for task, row in stored.items() if row["status"] == "ok"}
                    if stored and content_hash(image) != entry["image_hash"]:
                        raise OlaError(
                            f"{job.corpus.tar_path(tar)}: sample {entry['key']!r}, image {entry['image_index']}: its "
                            "bytes are not those that were indexed, which its targets are of; restore the tar"
                        )
                    for task, row in stored.items():
                        npy = _features(job.sets[task], row, entry)
                        _add(file, f"{entry['key']}{number}.{task}.npy", npy, note)
                if last:
                    text = job.corpus.read(tar, entry["text_offset"], entry["text_bytes"])
                    _add(file, f"{entry['key']}.{entry['text_member']}", text, note)
        try:
            fsync(temporary)
            os.replace(temporary, path)
        except FileNotFoundError:
            raise OlaError(f"{temporary}: another export into this folder removed it; run one at a time") from None
    finally:
        temporary.unlink(missing_ok=True)
    fsync(out)
    return []


def _features(target: TargetSet, row: dict[str, Any], entry: dict[str, Any]) -> bytes:
    """A stored target as an .npy file of float16."""
    key = entry["key"]
    if (row["image_index"], row["image_hash"]) != (entry["image_index"], entry["image_hash"]):
        raise OlaError(f"{target.path}: the commit does not list the images of the corpus index; `repair` it first")
    values, scales = target.read(row, key)
    scaled = None if scales is None else torch.tensor(scales)
    features = codec.decode(torch.tensor(values), scaled, target.identity.codec).half()
    if not bool(features.isfinite().all()):
        raise OlaError(f"{target.path}: sample {key!r} has values up to {row['absmax']:.4g}, more than float16 holds")
    buffer = io.BytesIO()
    np.save(buffer, features.numpy())
    return buffer.getvalue()


def _extension(image: bytes) -> str:
    """What the bytes call for, whatever the file was called."""
    return next((name for magic, name in _MAGIC.items() if image.startswith(magic)), "img")


def _noted(path: Path) -> dict[str, str]:
    """What the header of a tar's first member says beyond name and size; nothing if there is none."""
    try:
        with tarfile.open(path, "r:") as file:
            first = file.next()
            return {} if first is None else dict(first.pax_headers)
    except (FileNotFoundError, tarfile.TarError):
        return {}


def _add(file: tarfile.TarFile, name: str, data: bytes, note: dict[str, str]) -> None:
    """Append a member; the first one carries the note."""
    member = tarfile.TarInfo(name)  # time, owner and mode are fixed
    member.pax_headers = {} if file.offset else note
    member.size = len(data)
    file.addfile(member, io.BytesIO(data))
