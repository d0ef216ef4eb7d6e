"""Packing: LLaVA JSON with image folders, or a folder of captioned images, into a corpus of WebDataset tars."""

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featurize.corpus.samples import ImageFacts, Issue, PackReport, Progress, in_order, look_at, safe_key, text_length
from featurize.corpus.writer import CorpusWriter, TarBuilder, packed_path
from olavlm.data.corpus import IMAGE_PLACEHOLDER, Corpus, content_hash
from olavlm.data.images import decode_image
from olavlm.errors import OlaError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


def pack_llava_json(
    json_file: Path,
    image_roots: list[Path],
    out: Path,
    samples_per_tar: int = 1000,
    progress: Progress | None = None,
    threads: int = 4,
) -> PackReport:
    """Pack LLaVA JSON, a list of ``{"id", "image", "conversations"}`` (``image`` absent, a path or a list of paths).

    Each image is decoded once as a check and stored as it is (JPEG, PNG, WebP; anything else as PNG). What cannot be
    used is left out and listed. Packing into a corpus that is there adds the samples it does not have: a sample is the
    same if its JSON is.

    Args:
        json_file: ``.json``, or ``.jsonl`` with one sample per line.
        image_roots: folders the image paths are relative to, searched in this order.
        out: the corpus folder.
        samples_per_tar: samples in every tar but the last.
        progress: called after every sample.
        threads: threads that read and decode; each holds two samples at most.

    Raises:
        OlaError: a file or folder is missing or not what it should be, or nothing at all could be packed.
    """
    for root in image_roots:
        if not root.is_dir():
            raise OlaError(f"image folder {root}: there is no such folder")
    samples, digest = _read_json(json_file)
    return _pack(str(json_file), digest, samples, image_roots, out, samples_per_tar, progress, threads)


def pack_caption_folder(
    folder: Path, out: Path, samples_per_tar: int = 1000, progress: Progress | None = None, threads: int = 4
) -> PackReport:
    """Pack a folder (with its subfolders) of images, each with a ``.txt`` caption of the same stem beside it.

    A caption becomes the answer to a bare ``<image>``. Arguments, outcome and errors as in `pack_llava_json`.
    """
    if not folder.is_dir():
        raise OlaError(f"caption folder {folder}: there is no such folder")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    described = {image.with_suffix(".txt") for image in images}
    alone = [path for path in files if path.suffix == ".txt" and path not in described]
    left_out = [_about(path, folder, "caption without an image") for path in alone]
    samples = []
    for image in images:
        try:
            samples.append(_captioned(image, folder))
        except ValueError as error:
            left_out.append(_about(image, folder, str(error)))
    digest = content_hash(json.dumps(samples).encode())
    return _pack(str(folder), digest, samples, [folder], out, samples_per_tar, progress, threads, left_out)


@dataclass(frozen=True)
class _Candidate:
    """A sample to be packed: its id, its key, its JSON, the images it names."""

    name: str
    key: str
    text: bytes
    images: list[str]


@dataclass(frozen=True)
class _Packed:
    """A sample that can be packed: images as (extension, bytes, facts), the JSON, characters of its turns."""

    candidate: _Candidate
    images: list[tuple[str, bytes, ImageFacts]]
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

    def candidates(self, samples: Iterable[Any]) -> Iterator[_Candidate]:
        """The samples that are still to be packed."""
        for position, sample in enumerate(samples):
            name = f"{position:09d}"
            try:
                if not isinstance(sample, dict):
                    raise ValueError(f"expected an object, found {str(sample)[:40]!r}")
                name = name if sample.get("id") is None else str(sample["id"])
                images = _image_names(sample)
                text = json.dumps(sample, ensure_ascii=False).encode()
            except ValueError as error:
                self.left_out.append(Issue(self.source, name, self.source, str(error)))
                continue
            if key := self._key(name, text, images[0] if images else self.source):
                yield _Candidate(name, key, text, images)

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
    digest: str,
    samples: list[Any],
    roots: list[Path],
    out: Path,
    samples_per_tar: int,
    progress: Progress | None,
    threads: int,
    left_out: list[Issue] | None = None,
) -> PackReport:
    """Pack parsed samples; `digest` stands for them in the job's name."""
    job = content_hash(json.dumps([digest, [str(root) for root in roots], samples_per_tar]).encode())
    with CorpusWriter(out, f"pack {job}") as writer:
        before = len(writer.tars) - writer.resumed
        keys = _Keys(source, _packed_samples(writer), left_out=left_out or [])
        tar: TarBuilder | None = None
        done = 0
        try:
            prepared = in_order(lambda c: _prepare(source, c, roots), keys.candidates(samples), threads)
            for packed in prepared:
                if isinstance(packed, Issue):
                    keys.left_out.append(packed)
                else:
                    tar = tar or TarBuilder(out, _free_name(writer))
                    tar.add(packed.candidate.key, packed.images, packed.candidate.text, packed.length)
                    if tar.samples == samples_per_tar:
                        tar.publish(writer)
                        tar = None
                    done += 1
                if progress:
                    progress(done + keys.already + len(keys.left_out), len(samples), "samples")
            if tar:
                tar.publish(writer)
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


def _prepare(source: str, candidate: _Candidate, roots: list[Path]) -> _Packed | Issue:
    """Read and check a sample; runs in a thread."""
    file = source
    try:
        length = text_length("json", candidate.text, len(candidate.images))
        images = []
        for name in candidate.images:
            file = name
            images.append(_stored(_read_image(name, roots)))
    except ValueError as error:
        return Issue(source, candidate.name, file, str(error))
    return _Packed(candidate, images, length)


def _read_image(name: str, roots: list[Path]) -> bytes:
    """The bytes of an image below the first root that has it; ValueError if none has, or it cannot be read."""
    for root in roots:
        try:
            return (root / name).read_bytes()
        except FileNotFoundError:
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


def _captioned(image: Path, folder: Path) -> dict[str, Any]:
    """A LLaVA sample of an image and the caption beside it; ValueError without a readable one."""
    try:
        caption = image.with_suffix(".txt").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise ValueError("no caption beside it") from None
    except UnicodeDecodeError:
        raise ValueError("its caption is not UTF-8") from None
    if not caption:
        raise ValueError("its caption is empty")
    name = image.relative_to(folder)
    turns = [{"from": "human", "value": IMAGE_PLACEHOLDER}, {"from": "gpt", "value": caption}]
    return {"id": name.with_suffix("").as_posix(), "image": name.as_posix(), "conversations": turns}


def _about(file: Path, folder: Path, reason: str) -> Issue:
    """An issue with a file of a caption folder."""
    name = file.relative_to(folder)
    return Issue(str(folder), name.with_suffix("").as_posix(), str(name), reason)


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
    names = {tar.name for tar in writer.tars}
    return next(name for number in range(len(names), 2 * len(names) + 1) if (name := f"{number:06d}") not in names)


def _read_json(file: Path) -> tuple[list[Any], str]:
    """The samples of a LLaVA JSON file, and its content hash."""
    try:
        data = file.read_bytes()
        if file.suffix == ".jsonl":
            samples = [json.loads(line) for line in data.splitlines() if line.strip()]
        else:
            samples = json.loads(data)
    except OSError as error:
        raise OlaError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise OlaError(f"{file}: not JSON: {error}") from None
    if not isinstance(samples, list):
        raise OlaError(f"{file}: expected a list of samples, found {type(samples).__name__}")
    return samples, content_hash(data)
