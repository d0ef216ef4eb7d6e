"""Adopting: existing WebDataset tars become a corpus where they lie; only the index is written."""

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

from featurize.corpus.samples import (
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
from olavlm.data.corpus import Tar, content_hash, file_hash
from olavlm.data.objects import AnyPath, ObjectPath, join
from olavlm.errors import OlaError

#: A member's key and extension, as WebDataset parts them: the extension begins at the file name's first dot.
_MEMBER = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)")
_IMAGE = re.compile(r"(?:(\d+)\.)?(?:jpe?g|png|webp)")


def adopt(tars: Sequence[AnyPath], out: Path, progress: Progress | None = None, threads: int = 4) -> PackReport:
    """Write the index of existing WebDataset tars; the tars stay as and where they are.

    A path is stored as it is given: an absolute one absolutely, a relative one relative to the corpus. Images are
    ``jpg``, ``jpeg``, ``png`` or ``webp`` members (``0.jpg``, ``1.jpg``, … for several), the text is a ``json`` member
    in LLaVA's schema or else a ``txt`` caption. Every image is decoded once: those that cannot be stay in the index
    with the reason, and are listed. Samples without usable text and damaged tars are left out and listed. Tars the
    corpus has already are skipped.

    Args:
        tars: uncompressed tars, also in an object store.
        out: the corpus folder.
        progress: called after every tar.
        threads: threads that decode.

    Raises:
        OlaError: a tar is missing, or has changed since it was adopted; or nothing at all could be adopted.
    """
    for path in tars:
        if not path.is_file():
            raise OlaError(f"tar {path}: there is no such file")
    job = content_hash("\n".join(str(path.absolute()) for path in tars).encode())
    with CorpusWriter(out, f"adopt {job}") as writer:
        before = len(writer.tars) - writer.resumed
        earlier = {join(out, tar.path).resolve(): tar for tar in writer.tars[:before]}
        resumed = {join(out, tar.path).resolve(): tar for tar in writer.tars[before:]}
        left_out: list[Issue] = []
        already = 0
        for done, path in enumerate(tars, 1):
            known = (earlier | resumed).get(path.resolve())
            digest = file_hash(path)
            if known is None:
                left_out += _adopt_one(writer, path, digest, threads)
            elif known.hash != digest:
                raise OlaError(f"{path}: changed since it was adopted, hash {digest}, expected {known.hash}")
            else:
                already += known.name not in {tar.name for tar in writer.tars[before:]}
            if progress:
                progress(done, len(tars), "tars")
        left_out += writer.left_out
        writer.finish({str(path) for path in tars if path.resolve() not in earlier}, left_out, [])
        added = writer.tars[before:]
    samples, images = sum(tar.samples for tar in added), sum(tar.images for tar in added)
    return PackReport(out, len(added), samples, images, already, left_out, renamed=[])


@dataclass
class _Sample:
    """The members of a sample that matter: (offset, bytes) of the images by (index, extension) and of the texts."""

    key: str
    images: dict[tuple[int, str], tuple[int, bytes]] = field(default_factory=dict)
    texts: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    problem: str | None = None


def _adopt_one(writer: CorpusWriter, path: AnyPath, digest: str, threads: int) -> list[Issue]:
    """Index one tar and hand it to the writer; returns why it was not, if it was not."""
    source = str(path)
    same = next((tar for tar in writer.tars if tar.hash == digest), None)
    if same:
        return [Issue(source, "", source, f"the same content as tar {same.name} ({same.path})")]
    rows: list[dict[str, Any]] = []
    issues: list[Issue] = []
    try:
        for new_rows, new_issues in in_order(lambda sample: _index(source, sample), _samples(path), threads):
            rows += new_rows
            issues += new_issues
    except (tarfile.TarError, OSError) as error:
        return [Issue(source, "", source, f"damaged tar, or not a plain one: {error}")]
    if not rows:
        return [*issues, Issue(source, "", source, "no usable sample")]
    images = sum(row["image_index"] >= 0 for row in rows)
    samples = len({row["key"] for row in rows})
    tar = Tar(_free_name(writer, path), _stored(path, writer.out), digest, path.stat().st_size, samples, images)
    writer.add(tar, rows, issues)
    return []


def _samples(path: AnyPath) -> Iterator[_Sample]:
    """The samples of a tar: runs of members with the same key, as WebDataset groups them."""
    seen: set[str] = set()
    sample = _Sample("")
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            match = _MEMBER.fullmatch(member.name)
            if not (match and member.isreg()):
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
    """Index rows of a sample and what is wrong with it; runs in a thread."""
    images = [sample.images[place] for place in sorted(sample.images)]
    try:
        if sample.problem:
            raise ValueError(sample.problem)
        if re.search("[\ud800-\udfff]", sample.key):  # what tarfile makes of bytes that are no UTF-8
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
    """The conversation, or else the caption (img2dataset's ``json`` is metadata); ValueError if neither fits."""
    if not sample.texts:
        raise ValueError("no json or txt member")
    problem = ValueError()
    for member in ("json", "txt"):
        if member in sample.texts:
            offset, data = sample.texts[member]
            try:
                return Text(member, offset, len(data), text_length(member, data, images))
            except ValueError as error:
                problem = error
    raise problem


def _stored(path: AnyPath, out: Path) -> str:
    """A tar's path as the corpus lists it."""
    if isinstance(path, ObjectPath) or path.is_absolute():
        return str(path)
    return os.path.relpath(path.parent.resolve() / path.name, out.resolve())


def _free_name(writer: CorpusWriter, path: AnyPath) -> str:
    """A name no tar of the corpus has: the file's stem, with its folder's name or a number where that is taken."""
    taken = {tar.name for tar in writer.tars}
    stem, longer = safe_key(path.stem), safe_key(f"{path.absolute().parent.name}-{path.stem}")
    numbered = (f"{longer}-{number}" for number in count(2))
    return next(name for name in chain([stem, longer], numbered) if name not in taken)
