"""Packing: LLaVA JSON with image folders, or a folder of captioned images, into a corpus of WebDataset tars."""

import codecs
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import ijson

from featurize.corpus.samples import (
    IMAGE_EXTENSIONS,
    ImageFacts,
    Issue,
    PackReport,
    Progress,
    in_order,
    look_at,
    safe_key,
    text_length,
)
from featurize.corpus.writer import CorpusWriter, TarBuilder, packed_path
from olavlm.data.corpus import IMAGE_PLACEHOLDER, Corpus, content_hash
from olavlm.data.images import decode_image
from olavlm.errors import OlaError

_TOGETHER = 8  # samples that travel to a worker at once


def pack_llava_json(
    json_file: Path,
    image_roots: list[Path],
    out: Path,
    samples_per_tar: int = 1000,
    progress: Progress | None = None,
    workers: int = 1,
) -> PackReport:
    """Pack LLaVA JSON, a list of ``{"id", "image", "conversations"}`` (``image`` absent, a path or a list of paths).

    Each image is decoded once as a check and stored as it is (JPEG, PNG, WebP; anything else as PNG). What cannot be
    used is left out and listed. Packing into a corpus that is there adds the samples it does not have: a sample is the
    same if its JSON is.

    The JSON is streamed, whatever its size; what stays in memory is key and hash of every sample, of the corpus and
    of the JSON: about 0.3 kB each.

    Args:
        json_file: a list, or with the name ``.jsonl`` one sample per line.
        image_roots: folders the image paths are relative to, searched in this order.
        out: the corpus folder.
        samples_per_tar: samples in every tar but the last.
        progress: called after every sample.
        workers: processes that read and decode; each holds 16 samples at most.

    Raises:
        OlaError: a file or folder is missing or not what it should be, or nothing at all could be packed.
    """
    for root in image_roots:
        if not root.is_dir():
            raise OlaError(f"image folder {root}: there is no such folder")
    read = _read_lines if json_file.suffix == ".jsonl" else _read_list
    return _pack(str(json_file), partial(read, json_file), image_roots, out, samples_per_tar, progress, workers)


def pack_caption_folder(
    folder: Path, out: Path, samples_per_tar: int = 1000, progress: Progress | None = None, workers: int = 1
) -> PackReport:
    """Pack a folder (with its subfolders) of images, each with a ``.txt`` caption of the same stem beside it.

    A caption becomes the answer to a bare ``<image>``. Arguments, outcome and errors as in `pack_llava_json`.
    """
    if not folder.is_dir():
        raise OlaError(f"caption folder {folder}: there is no such folder")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return _pack(str(folder), partial(_read_captions, folder, files), [folder], out, samples_per_tar, progress, workers)


@dataclass(frozen=True)
class _Sample:
    """A sample of the source: its id, its JSON, the images it names."""

    name: str
    text: bytes
    images: list[str]


@dataclass(frozen=True)
class _Packed:
    """A sample that can be packed: its key, images as (extension, bytes, facts), the JSON, characters of its turns."""

    key: str
    images: list[tuple[str, bytes, ImageFacts]]
    text: bytes
    length: int


@dataclass
class _Keys:
    """Gives every sample its key, once per content; knows what the corpus has already."""

    source: str
    there: dict[str, str]  # key → hash of its JSON, of what the corpus has
    already: int = 0
    left_out: list[Issue] = field(default_factory=list)
    renamed: list[Issue] = field(default_factory=list)
    _new: dict[str, str] = field(default_factory=dict)

    def candidates(self, samples: Iterable[_Sample | Issue]) -> Iterator[tuple[str, _Sample]]:
        """The samples that are still to be packed, and their keys."""
        for sample in samples:
            if isinstance(sample, Issue):
                self.left_out.append(sample)
            elif key := self._key(sample.name, sample.text, sample.images[0] if sample.images else self.source):
                yield key, sample

    def _key(self, name: str, text: bytes, file: str) -> str | None:
        """The sample's key, or None if there is nothing to pack: the corpus has it, or the source says it twice."""
        digest = content_hash(text)
        plain = safe_key(name)
        key = plain
        if self._other(plain, digest):
            key = f"{plain}-{digest[:8]}"
            if self._other(key, digest):
                raise OlaError(f"{self.source}: {name}: its hash collides with another sample's; give it another id")
        if key in self._new:
            self.left_out.append(Issue(self.source, name, file, "duplicate of a sample in the same source"))
            return None
        self._new[key] = digest
        if key != plain:
            reason = f"duplicate key: another sample is called {name} too; packed as {key}"
            self.renamed.append(Issue(self.source, name, file, reason))
        if key in self.there:
            self.already += 1
            return None
        return key

    def _other(self, key: str, digest: str) -> bool:
        """Whether another sample has the key."""
        return self.there.get(key, digest) != digest or self._new.get(key, digest) != digest


def _pack(
    source: str,
    read: Callable[[], Iterator[Any]],
    roots: list[Path],
    out: Path,
    samples_per_tar: int,
    progress: Progress | None,
    workers: int,
) -> PackReport:
    """Pack what `read` yields, which is samples or, in the place of one, what is wrong with it."""
    total, digest = _survey(_samples(source, read()))
    job = content_hash(json.dumps([digest, [str(root) for root in roots], samples_per_tar]).encode())
    with CorpusWriter(out, f"pack {job}") as writer:
        before = len(writer.tars) - writer.resumed
        keys = _Keys(source, _packed_samples(writer))
        tar: TarBuilder | None = None
        done = 0
        try:
            prepare = partial(_prepare, source, roots)
            for packed in in_order(prepare, keys.candidates(_samples(source, read())), workers, _TOGETHER):
                if isinstance(packed, Issue):
                    keys.left_out.append(packed)
                else:
                    tar = tar or TarBuilder(out, _free_name(writer))
                    tar.add(packed.key, packed.images, packed.text, packed.length)
                    if tar.samples == samples_per_tar:
                        tar.publish(writer)
                        tar = None
                    done += 1
                if progress:
                    progress(done + keys.already + len(keys.left_out), total, "samples")
            if tar:
                tar.publish(writer)
            if progress:
                progress(total, total, "samples")
        finally:
            if tar:
                tar.discard()
        writer.finish({source}, keys.left_out, keys.renamed)
        added = writer.tars[before:]
    return PackReport(
        out=out,
        tars=len(added),
        samples=sum(t.samples for t in added),
        images=sum(t.images for t in added),
        already=keys.already - sum(t.samples for t in added[: writer.resumed]),
        left_out=keys.left_out,
        renamed=keys.renamed,
    )


def _samples(source: str, given: Iterable[Any]) -> Iterator[_Sample | Issue]:
    """What a source gives, as samples; a sample without an id is called by its position."""
    for position, sample in enumerate(given):
        if isinstance(sample, Issue):
            yield sample
            continue
        name = f"{position:09d}"
        try:
            if not isinstance(sample, dict):
                raise ValueError(f"expected an object, found {str(sample)[:40]!r}")
            name = name if sample.get("id") is None else str(sample["id"])
            yield _Sample(name, json.dumps(sample, ensure_ascii=False).encode(), _image_names(sample))
        except (ValueError, RecursionError) as error:
            yield Issue(source, name, source, str(error))


def _survey(samples: Iterable[_Sample | Issue]) -> tuple[int, str]:
    """How many samples there are, and a hash of them all; finds a damaged file before anything is written."""
    number = 0
    digest = hashlib.blake2b(digest_size=16)
    for sample in samples:
        number += 1
        digest.update((sample.reason.encode() if isinstance(sample, Issue) else sample.text) + b"\n")
    return number, digest.hexdigest()


def _prepare(source: str, roots: list[Path], candidate: tuple[str, _Sample]) -> _Packed | Issue:
    """Read and check a sample; runs in a worker."""
    key, sample = candidate
    file = source
    try:
        length = text_length("json", sample.text, len(sample.images))
        images = []
        for name in sample.images:
            file = name
            images.append(_stored(_read_image(name, roots)))
    except ValueError as error:
        return Issue(source, sample.name, file, str(error))
    return _Packed(key, images, sample.text, length)


def _read_image(name: str, roots: list[Path]) -> bytes:
    """The bytes of an image below the first root that has it; ValueError if none has, or it cannot be read."""
    for root in roots:
        try:
            return (root / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ValueError(f"cannot be read ({error.strerror})") from None
    raise ValueError(f"not found in {', '.join(map(str, roots))}")


def _stored(data: bytes) -> tuple[str, bytes, ImageFacts]:
    """Extension, bytes and facts of an image as it goes into the tar; ValueError if it cannot be decoded."""
    extension = _extension(data)
    if extension is None:
        buffer = io.BytesIO()
        decode_image(data).save(buffer, "PNG")
        extension, data = "png", buffer.getvalue()
    facts = look_at(data)
    if facts.error:
        raise ValueError(facts.error)
    return extension, data, facts


def _extension(data: bytes) -> str | None:
    """jpg, png or webp by content; file names lie."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _image_names(sample: dict[str, Any]) -> list[str]:
    """The image paths of a LLaVA sample."""
    image = sample.get("image") or []
    names = [image] if isinstance(image, str) else image
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"image: expected a path or a list of paths, found {str(image)[:80]!r}")
    return names


def _read_captions(folder: Path, files: list[Path]) -> Iterator[dict[str, Any] | Issue]:
    """A LLaVA sample for every image of a folder that has a caption; an issue for every file that is alone."""
    suffixes = {f".{extension}" for extension in IMAGE_EXTENSIONS}
    described = {path.with_suffix(".txt") for path in files if path.suffix.lower() in suffixes}
    for path in files:
        name = path.relative_to(folder)
        try:
            if path.suffix.lower() in suffixes:
                turns = [{"from": "human", "value": IMAGE_PLACEHOLDER}, {"from": "gpt", "value": _caption(path)}]
                yield {"id": name.with_suffix("").as_posix(), "image": name.as_posix(), "conversations": turns}
            elif path.suffix == ".txt" and path not in described:
                raise ValueError("caption without an image")
        except ValueError as error:
            yield Issue(str(folder), name.with_suffix("").as_posix(), str(name), str(error))


def _caption(image: Path) -> str:
    """The caption beside an image; ValueError without a readable one."""
    try:
        caption = image.with_suffix(".txt").read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        raise ValueError("no caption beside it") from None
    except UnicodeDecodeError:
        raise ValueError("its caption is not UTF-8") from None
    except OSError as error:
        raise ValueError(f"its caption cannot be read ({error.strerror})") from None
    if not caption:
        raise ValueError("its caption is empty")
    return caption


def _packed_samples(writer: CorpusWriter) -> dict[str, str]:
    """Key → hash of its JSON, of every sample in the tars that packing wrote."""
    corpus = Corpus(writer.out, "", writer.tars)
    packed = [tar for tar in writer.tars if tar.path == packed_path(tar.name)]
    found = {}
    for tar in packed:
        columns = corpus.index(tar).select(["key", "text_offset", "text_bytes"]).to_pydict()
        for key, offset, nbytes in zip(*columns.values(), strict=True):
            found[key] = content_hash(corpus.read(tar, offset, nbytes))
    return found


def _free_name(writer: CorpusWriter) -> str:
    """The next number that no tar of the corpus has."""
    return next(name for number in count(len(writer.names)) if (name := f"{number:06d}") not in writer.names)


def _read_list(file: Path) -> Iterator[Any]:
    """The samples of a JSON list, one at a time; OlaError if it is none."""
    number = 0
    try:
        with open(file, "rb") as stream:
            start = stream.read(io.DEFAULT_BUFFER_SIZE)
            if not start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                raise OlaError(f"{file}: expected a list of samples (a file of one sample per line is called .jsonl)")
            stream.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
            for sample in ijson.items(stream, "item", use_float=True):
                yield sample
                number += 1
    except OSError as error:
        raise OlaError(f"{file}: cannot be read ({error.strerror})") from None
    except ijson.JSONError as error:
        reason = str(error).splitlines()[0]
        raise OlaError(f"{file}: not JSON (after {number:,} samples: {reason})") from None


def _read_lines(file: Path) -> Iterator[Any]:
    """The samples of JSON lines, one at a time; an issue in the place of a line that is none."""
    try:
        with open(file, "rb") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    if line.strip():
                        yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield Issue(str(file), f"line {number}", str(file), f"line {number} is not JSON: {error}")
    except OSError as error:
        raise OlaError(f"{file}: cannot be read ({error.strerror})") from None
