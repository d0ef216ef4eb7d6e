"""Contract 1, the reading side: WebDataset tars, and an index that knows every member's byte range.

    corpus.json          schema version, corpus id; written last, so that a corpus without it is not finished
    tars.parquet         one row per tar: name, path, content hash, bytes, samples, images
    index/<name>.parquet one row per image of the tar (one for a text-only sample)
    tars/<name>.tar      where packing puts its tars; adopted ones stay where they are
    left_out.jsonl       what packing could not use, with file and reason; renamed.jsonl: whose id was taken

`featurize.corpus` writes it. A corpus may grow: rows are appended to ``tars.parquet``, nothing else changes.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from olavlm.data.cache import Cache
from olavlm.data.files import OpenFiles
from olavlm.data.objects import AnyPath, ObjectPath, as_path, join
from olavlm.errors import OlaError, Unreadable

SCHEMA_VERSION = 1

#: Stands for an image in a conversation's text.
IMAGE_PLACEHOLDER = "<image>"

TARS_SCHEMA = pa.schema(
    [
        ("name", pa.string()),  # unique in the corpus; stem of the tar's index and commit files
        ("path", pa.string()),  # absolute, a URL, or relative to the corpus folder
        ("hash", pa.string()),
        ("bytes", pa.int64()),
        ("samples", pa.int64()),
        ("images", pa.int64()),
    ]
)

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image_index", pa.int32()),  # −1 for a text-only sample
        ("modality", pa.string()),  # image | text
        ("image_offset", pa.int64()),
        ("image_bytes", pa.int64()),
        ("image_hash", pa.string()),  # of the encoded bytes; null without an image
        ("width", pa.int32()),  # of the decoded, upright image; 0 if it cannot be decoded
        ("height", pa.int32()),
        ("error", pa.string()),  # why the image cannot be decoded; null if it can
        ("text_member", pa.string()),  # json | txt
        ("text_offset", pa.int64()),
        ("text_bytes", pa.int64()),
        ("text_length", pa.int32()),  # characters of all turns
    ]
)


def content_hash(data: bytes) -> str:
    """The hash that names contents everywhere: BLAKE2b, 16 bytes, in hex."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def file_hash(path: AnyPath) -> str:
    """`content_hash` of a file, without loading it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


@dataclass(frozen=True, slots=True)
class Tar:
    """One tar of a corpus, as ``tars.parquet`` lists it.

    Attributes:
        name: unique in the corpus; stem of the tar's index and commit files.
        path: absolute, a URL, or relative to the corpus folder.
        hash: `content_hash` of the whole file.
        bytes: its size.
        samples: samples in its index.
        images: images in its index, undecodable ones included.
    """

    name: str
    path: str
    hash: str
    bytes: int
    samples: int
    images: int


class Corpus:
    """A finished corpus, open for reading; safe to share between threads."""

    def __init__(self, path: AnyPath, corpus_id: str, tars: list[Tar], cache: Cache | None = None) -> None:
        self.path = path
        self.id = corpus_id
        self.tars = tars
        self._cache = cache
        self._by_name = {tar.name: tar for tar in tars}
        self._files = OpenFiles()

    @classmethod
    def open(cls, path: AnyPath | str, cache: Cache | None = None) -> "Corpus":
        """Open the corpus in a folder, or at a URL.

        Args:
            path: the folder or URL.
            cache: keeps what is read of tars in an object store.

        Raises:
            OlaError: there is none, it is not finished, damaged, or of another schema version.
        """
        path = as_path(path)
        manifest = path / "corpus.json"
        if not manifest.is_file():
            state = "packing was not finished; run it again" if path.is_dir() else "there is no such folder"
            raise OlaError(f"no corpus in {path}: corpus.json is missing ({state})")
        try:
            header = json.loads(manifest.read_text())
            version, corpus_id = header["schema"], str(header["id"])
        except (ValueError, KeyError, TypeError) as error:
            raise OlaError(f"{manifest}: not a corpus manifest ({error!r}), expected schema and id") from None
        if version != SCHEMA_VERSION:
            raise OlaError(f"{manifest}: schema version {version}, this software reads {SCHEMA_VERSION}")
        columns = read_parquet(path / "tars.parquet", TARS_SCHEMA).to_pydict()
        return cls(path, corpus_id, [Tar(*row) for row in zip(*columns.values(), strict=True)], cache)

    def tar(self, name: str) -> Tar:
        """The tar of that name.

        Raises:
            OlaError: the corpus has none.
        """
        if name not in self._by_name:
            raise OlaError(f"{self.path}: no tar named {name!r} in tars.parquet")
        return self._by_name[name]

    def tar_path(self, tar: Tar) -> AnyPath:
        """Where a tar's file is."""
        return join(self.path, tar.path)

    def index(self, tar: Tar) -> pa.Table:
        """The tar's index: `INDEX_SCHEMA`, rows in the order of the tar, images of a sample together and in order.

        Raises:
            OlaError: the index is missing, damaged, or was made of another content of the tar.
        """
        file = index_file(self.path, tar.name)
        table = read_parquet(file, INDEX_SCHEMA)
        made_of = (table.schema.metadata or {}).get(b"tar_hash", b"").decode()
        if made_of != tar.hash:
            raise OlaError(f"{file}: made of a tar with hash {made_of or 'unknown'}, tars.parquet says {tar.hash}")
        return table

    def read(self, tar: Tar, offset: int, nbytes: int, expected: str | None = None) -> bytes:
        """Read a byte range of a tar (``pread``: no shared position, no lock held while reading).

        Args:
            tar: the tar.
            offset: where the range begins.
            nbytes: how long it is.
            expected: `content_hash` of the range, where it is known; bytes with another are returned, but not cached.

        Raises:
            OlaError: the tar is gone, has another size than when it was indexed, or ends before the range does.
        """
        path = self.tar_path(tar)
        if self._cache is None or not isinstance(path, ObjectPath):
            return self._read(tar, path, offset, nbytes)
        return self._cache.read(
            f"{tar.hash} {offset} {nbytes}",
            fetch=lambda: self._read(tar, path, offset, nbytes),
            good=lambda data: expected in (None, content_hash(data)),
        )

    def _read(self, tar: Tar, path: AnyPath, offset: int, nbytes: int) -> bytes:
        try:
            data, size = self._files.pread(path, nbytes, offset), self._files.size(path)
        except OSError as error:
            raise Unreadable(
                f"{path}: tar {tar.name} of corpus {self.path} cannot be read ({error.strerror})"
            ) from None
        if size != tar.bytes:
            raise OlaError(f"{path}: {size} bytes, {tar.bytes} when it was indexed; it was cut or replaced")
        if len(data) != nbytes:
            raise OlaError(f"{path}: {len(data)} bytes at offset {offset}, expected {nbytes}")
        return data

    def verify_tar(self, tar: Tar) -> None:
        """Recompute a tar's hash.

        Raises:
            OlaError: the tar is gone, or its content is not what was indexed.
        """
        path = self.tar_path(tar)
        try:
            found = file_hash(path)
        except OSError as error:
            raise Unreadable(
                f"{path}: tar {tar.name} of corpus {self.path} cannot be read ({error.strerror})"
            ) from None
        if found != tar.hash:
            raise OlaError(f"{path}: changed since it was indexed, hash {found}, expected {tar.hash}")


def conversation(text_member: str, data: bytes) -> list[dict[str, str]]:
    """The turns of a sample, as LLaVA writes them.

    Args:
        text_member: ``json`` (LLaVA's schema) or ``txt`` (a caption about one image, as img2dataset
            writes it).
        data: the member's bytes.

    Returns:
        ``[{"from": "human", "value": …}, {"from": "gpt", "value": …}, …]``, alternating. As LLaVA's training does, a
        leading ``gpt`` turn is dropped, and the image a turn speaks of goes to its front, wherever its placeholder was
        (half of LLaVA-558K ends in ``\\n<image>``); of several in a turn each stays in its place.

    Raises:
        ValueError: not UTF-8, not JSON, or not turns of human and gpt; the message is the reason.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise ValueError("text is not UTF-8") from None
    if text_member == "txt":
        if not text.strip():
            raise ValueError("empty caption")
        return [{"from": "human", "value": IMAGE_PLACEHOLDER}, {"from": "gpt", "value": text.strip()}]
    try:
        sample = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    return _turns(sample)


def _turns(sample: Any) -> list[dict[str, str]]:
    """The checked turns of a parsed LLaVA sample."""
    given = sample.get("conversations") if isinstance(sample, dict) else None
    if not isinstance(given, list):
        raise ValueError("no list of conversations")
    result: list[dict[str, str]] = []
    for turn in given:
        if not (isinstance(turn, dict) and isinstance(turn.get("value"), str) and turn.get("from") in {"human", "gpt"}):
            raise ValueError(f"turn {len(result)}: expected from (human or gpt) and value, found {str(turn)[:80]}")
        result.append({"from": turn["from"], "value": turn["value"]})
    if result and result[0]["from"] == "gpt":
        del result[0]
    if [turn["from"] for turn in result] != [("human", "gpt")[i % 2] for i in range(len(result))]:
        raise ValueError("turns do not alternate between human and gpt")
    if len(result) < 2:
        raise ValueError("no answer of gpt in the conversation")
    for turn in result:
        if turn["value"].count(IMAGE_PLACEHOLDER) == 1:
            text = turn["value"].replace(IMAGE_PLACEHOLDER, "").strip()
            turn["value"] = f"{IMAGE_PLACEHOLDER}\n{text}".strip()
    return result


def index_file(corpus: AnyPath, name: str) -> AnyPath:
    """Where the index of the tar `name` is."""
    return corpus / "index" / f"{name}.parquet"


def read_parquet(file: AnyPath, schema: pa.Schema) -> pa.Table:
    """Read a Parquet file that must have exactly these columns.

    Raises:
        OlaError: it is missing, cannot be read, is damaged or has other columns.
    """
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise Unreadable(f"{file}: missing") from None
    except OSError as error:
        raise Unreadable(f"{file}: cannot be read ({error.strerror})") from None
    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read()
    except (OSError, pa.ArrowException) as error:
        raise OlaError(f"{file}: damaged ({str(error).splitlines()[0]})") from None
    if not table.schema.equals(schema, check_metadata=False):
        raise OlaError(f"{file}: columns {table.schema.names}, expected {schema.names}")
    return table
