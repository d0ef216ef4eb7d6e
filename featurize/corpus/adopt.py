"""Adopting: existing WebDataset tars become a corpus where they lie; only the index is written."""

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

import pyarrow as pa

from featurize.corpus.samples import (
    IMAGE_EXTENSIONS,
    Issue,
    PackReport,
    Progress,
    Text,
    in_order,
    index_rows,
    look_at,
    safe_key,
    text_length,
)
from featurize.corpus.writer import CorpusWriter
from olavlm.data.corpus import INDEX_SCHEMA, Tar, content_hash, file_hash, index_file
from olavlm.data.objects import AnyPath, ObjectPath, join
from olavlm.errors import OlaError

#: A member's key and extension, as WebDataset parts them: the extension begins at the file name's first dot.
_MEMBER = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)")
_IMAGE = re.compile(rf"(?:(\d{{1,9}})\.)?(?:{'|'.join(IMAGE_EXTENSIONS)})")


def adopt(tars: Sequence[AnyPath], out: Path, progress: Progress | None = None, workers: int = 1) -> PackReport:
    """Write the index of existing WebDataset tars; the tars stay as and where they are.

    A path is stored as it is given: an absolute one absolutely, a relative one relative to the corpus. Images are
    members with one of `IMAGE_EXTENSIONS` (``0.jpg``, ``1.jpg``, … for several), the text is a ``json`` member in
    LLaVA's schema or else a ``txt`` caption. Every image is decoded once: those that cannot be stay in the index with
    the reason, and are listed. Samples without usable text and damaged tars are left out and listed. Tars the corpus
    has already are skipped; those written to since are hashed again to see that their content is the same.

    Args:
        tars: uncompressed tars, also in an object store.
        out: the corpus folder.
        progress: called after every tar.
        workers: processes, each with a tar of its own; memory: the samples of a tar, without images, two times each.

    Raises:
        OlaError: a tar is missing, or has changed since it was adopted; or nothing at all could be adopted.
    """
    for path in tars:
        if not path.is_file():
            raise OlaError(f"tar {path}: there is no such file")
        if not _is_unicode(str(path)):
            raise OlaError(f"tar {path}: its path is not UTF-8; rename it")
    given = {path.resolve(): path for path in tars}
    job = content_hash("\n".join(str(path.absolute()) for path in tars).encode())
    left_out: list[Issue] = []
    with CorpusWriter(out, f"adopt {job}") as writer:
        before = len(writer.tars) - writer.resumed
        there = {join(out, tar.path).resolve(): tar for tar in writer.tars}
        by_hash = {tar.hash: tar for tar in writer.tars}
        new = [path for resolved, path in given.items() if resolved not in there]
        for resolved in given.keys() & there.keys():
            _check_unchanged(out, resolved, there[resolved])
        done = len(given) - len(new)
        for path, found in zip(new, in_order(_look_into, new, workers), strict=False):  # no item beyond the last path
            same = by_hash.get(found.hash)
            if same:
                reason = f"the same content as tar {same.name} ({same.path})"
                left_out.append(Issue(str(path), "", str(path), reason))
            elif found.index is None:
                left_out += found.issues
            else:
                tar = Tar(
                    _free_name(writer, path), _stored(path, out), found.hash, found.bytes, found.samples, found.images
                )
                writer.add(tar, found.index, found.issues)
                by_hash[tar.hash] = tar
            done += 1
            if progress:
                progress(done, len(given), "tars")
        earlier = {join(out, tar.path).resolve() for tar in writer.tars[:before]}
        left_out += writer.left_out
        writer.finish({str(path) for resolved, path in given.items() if resolved not in earlier}, left_out, [])
        added = writer.tars[before:]
    samples, images = sum(tar.samples for tar in added), sum(tar.images for tar in added)
    return PackReport(out, len(added), samples, images, len(given.keys() & earlier), left_out, renamed=[])


def _check_unchanged(out: Path, path: AnyPath, tar: Tar) -> None:
    """OlaError unless a tar is what was adopted; it is read only where its size or its time leave that open."""
    stat, index = path.stat(), index_file(out, tar.name)
    if stat.st_size == tar.bytes and index.exists() and stat.st_mtime < index.stat().st_mtime:
        return
    digest = file_hash(path)
    if digest != tar.hash:
        raise OlaError(f"{path}: changed since it was adopted, hash {digest}, expected {tar.hash}")


@dataclass(frozen=True)
class _Found:
    """What a tar holds; without an index it cannot be adopted, and the issues say why."""

    hash: str
    bytes: int
    samples: int
    images: int
    index: pa.Table | None
    issues: list[Issue]


def _look_into(path: AnyPath) -> _Found:
    """Read a tar: its hash, its index, what is wrong with it; runs in a process of its own."""
    source = str(path)
    rows: list[dict[str, Any]] = []
    issues: list[Issue] = []
    digest = ""
    try:
        digest = file_hash(path)
        for sample in _samples(path):
            new_rows, new_issues = _index(source, sample)
            rows += new_rows
            issues += new_issues
    except (tarfile.TarError, OSError) as error:
        return _Found(digest, 0, 0, 0, None, [Issue(source, "", source, f"damaged tar, or not a plain one: {error}")])
    if not rows:
        return _Found(digest, 0, 0, 0, None, [*issues, Issue(source, "", source, "no usable sample")])
    images = sum(row["image_index"] >= 0 for row in rows)
    samples = len({row["key"] for row in rows})
    index = pa.Table.from_pylist(rows, INDEX_SCHEMA)
    return _Found(digest, path.stat().st_size, samples, images, index, issues)


@dataclass
class _Sample:
    """The members of a sample that matter: (offset, bytes) of the images by (index, extension) and of the texts."""

    key: str
    images: dict[tuple[int, str], tuple[int, bytes]] = field(default_factory=dict)
    texts: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    problem: str | None = None


def _samples(path: AnyPath) -> Iterator[_Sample]:
    """The samples of a tar: runs of members with the same key, as WebDataset groups them."""
    seen: set[str] = set()
    sample = _Sample("")
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            match = _MEMBER.fullmatch(member.name)
            if not (match and member.isreg()) or member.issparse():  # a sparse member is no range of bytes
                continue
            key, extension = match[1], match[2].lower()
            if key != sample.key:
                if sample.images or sample.texts:
                    yield sample
                sample = _Sample(key, problem="duplicate key in this tar" if key in seen else None)
                seen.add(key)
            _take(sample, extension, tar, member)
        if sample.images or sample.texts:
            yield sample
        # tarfile takes any unreadable header after the first for the end; the true end is a block of zeros
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no end-of-archive mark at byte {tar.offset}; it was cut")
        while padding := tar.fileobj.read(1 << 20):
            if any(padding):
                raise tarfile.ReadError(f"data behind the end-of-archive mark at byte {tar.offset}; tars joined?")


def _take(sample: _Sample, extension: str, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    """Read a member into its sample, if it is an image or a text."""
    image = _IMAGE.fullmatch(extension)
    if not image and extension not in {"json", "txt"}:
        return
    file = tar.extractfile(member)
    assert file is not None  # a regular member
    content = (member.offset_data, file.read())
    if image:
        place = (int(image[1] or 0), extension)
        sample.problem = sample.problem or (f"two members {member.name}" if place in sample.images else None)
        sample.images[place] = content
    else:
        sample.problem = sample.problem or (f"two members {member.name}" if extension in sample.texts else None)
        sample.texts[extension] = content


def _index(source: str, sample: _Sample) -> tuple[list[dict[str, Any]], list[Issue]]:
    """Index rows of a sample and what is wrong with it."""
    images = [sample.images[place] for place in sorted(sample.images)]
    try:
        if sample.problem:
            raise ValueError(sample.problem)
        if not _is_unicode(sample.key):
            raise ValueError("the member's name is not UTF-8")
        text = _text(sample, len(images))
    except ValueError as error:
        return [], [Issue(source, sample.key, f"{sample.key}.*", str(error))]
    described = [(offset, look_at(data)) for offset, data in images]
    names = [f"{sample.key}.{extension}" for _, extension in sorted(sample.images)]
    issues = [
        Issue(source, sample.key, name, facts.error)
        for name, (_, facts) in zip(names, described, strict=True)
        if facts.error
    ]
    return index_rows(sample.key, described, text), issues


def _text(sample: _Sample, images: int) -> Text:
    """The conversation, or else the caption; ValueError if it does not fit."""
    if not sample.texts:
        raise ValueError("no json or txt member")
    _, conversations = sample.texts.get("json", (0, b""))
    # img2dataset's json is metadata; but a conversation that is broken is never replaced by a caption in silence
    member = "json" if b'"conversations"' in conversations or "txt" not in sample.texts else "txt"
    offset, data = sample.texts[member]
    return Text(member, offset, len(data), text_length(member, data, images))


def _is_unicode(name: str) -> bool:
    """False for what Python makes of a name whose bytes are no UTF-8."""
    return not re.search("[\ud800-\udfff]", name)


def _stored(path: AnyPath, out: Path) -> str:
    """A tar's path as the corpus lists it."""
    if isinstance(path, ObjectPath) or path.is_absolute():
        return str(path)
    return os.path.relpath(path.parent.resolve() / path.name, out.resolve())


def _free_name(writer: CorpusWriter, path: AnyPath) -> str:
    """A name no tar of the corpus has: the file's stem, with its folder's name or a number where that is taken."""
    stem, longer = safe_key(path.stem), safe_key(f"{path.absolute().parent.name}-{path.stem}")
    numbered = (f"{longer}-{number}" for number in count(2))
    return next(name for name in chain([stem, longer], numbered) if name not in writer.names)
