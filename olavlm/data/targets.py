"""Contract 2, the reading side: which targets a store holds, what was committed, and one image's target at a time.

::

    targets/
      store.json                       schema version, corpus id
      depth-<identity>/target.json     the identity in full, images per block, format
      depth-<identity>/values.zarr     Zarr v3; one shard = one block of images of one tar, one chunk = one image
      depth-<identity>/scales.zarr     codecs with a scale per token
      depth-<identity>/tars            instead of both in the WebDataset form; one tar = one block (`olavlm.data.tars`)
      depth-<identity>/commits/<tar>.parquet    one row per image (and per text-only sample) of a finished tar
      depth-<identity>/superseded/     commits that a retry of failed images replaced; runs pinned to them go on reading
      depth-<identity>/manifest.parquet         what `olavlm.data.manifest` remembers of the commits, if compacted
      dropped/<set>.<generation>       object stores only: the lease of who removes a set, until all of it is gone

The commit is the only truth: what no commit lists does not exist, whatever bytes lie there. An image's row in the array
is ``block * images_per_block + row``; the trainer does not need the array, it reads the byte ranges of the commits.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from olavlm.config import Codec, Dtype, Format, TeacherConfig, View
from olavlm.data.atomic import ensure
from olavlm.data.cache import Cache
from olavlm.data.codec import Layout, layout
from olavlm.data.corpus import content_hash
from olavlm.data.files import OpenFiles
from olavlm.data.lease import leased
from olavlm.data.objects import AnyPath, ObjectPath, as_path
from olavlm.errors import OlaError, Unreadable

SCHEMA_VERSION = 1
DROPPED = "dropped"

COMMIT_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("image_index", pa.int32()),  # -1: a text-only sample
        pa.field("image_hash", pa.string()),
        pa.field("status", pa.string()),  # ok | failed | no_image
        pa.field("reason", pa.string()),  # of a failure
        pa.field("block", pa.int32()),  # shard number; -1 without a target, as all the following
        pa.field("row", pa.int32()),  # inside the block: the image's ordinal in its tar modulo block
        pa.field("values_offset", pa.int64()),  # inside the shard object
        pa.field("values_bytes", pa.int64()),
        pa.field("scales_offset", pa.int64()),
        pa.field("scales_bytes", pa.int64()),
        pa.field("checksum", pa.uint32()),  # crc32c over key, scales, values
        pa.field("rms", pa.float32()),  # of the features before quantization
        pa.field("absmax", pa.float32()),
    ]
)


class TarId(Protocol):
    """What a commit needs to know of a corpus tar (`olavlm.data.corpus.Tar` has it)."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def hash(self) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class Identity:
    """Everything a target's values depend on. Another identity is another folder; nothing is ever mixed."""

    task: str
    teacher: str  # registered name
    weights: str  # label: hub id, or the base name of a folder
    revision: str | None
    weights_hash: str  # over the tensors, and over the configuration
    compute_dtype: Dtype
    view: View
    input_size: int
    preprocessing: str  # resample filter, image backend and its version, rescaling
    position_embedding: str  # rule by which the teacher's position embeddings meet input_size
    layers: tuple[int, ...] | None
    pooling: str  # how the feature comes from the network's outputs
    grid: int
    width: int
    codec: Codec

    @property
    def tokens(self) -> int:
        """Tokens per image."""
        return self.grid * self.grid

    @property
    def layout(self) -> Layout:
        """What is stored of one image."""
        return layout(self.tokens, self.width, self.codec)

    @property
    def digest(self) -> str:
        """12 hex digits of the hash of the canonical JSON."""
        return blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=6).hexdigest()

    @property
    def folder(self) -> str:
        """The target set's folder inside the store."""
        return f"{self.task}-{self.digest}"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Identity":
        """The inverse of ``dataclasses.asdict`` after JSON (``layers`` is a list there)."""
        layers = data["layers"]
        return cls(**{**data, "layers": None if layers is None else tuple(layers)})

    def differences(self, teacher: TeacherConfig) -> list[str]:
        """Where this identity is not what `teacher` states, as ``field: <stored> here, <wanted> wanted``.

        A field the configuration leaves open (layers, revision) fits anything; weights fit by hub id or folder name.
        """
        wanted = {
            "teacher": teacher.teacher,
            "revision": teacher.revision,
            "compute_dtype": teacher.dtype,
            "view": teacher.view,
            "input_size": teacher.input_size,
            "layers": None if teacher.layers is None else tuple(teacher.layers),
            "grid": teacher.grid,
            "width": teacher.width,
            "codec": teacher.codec,
        }
        found = asdict(self)
        wrong = [
            f"{name}: {found[name]!r} here, {want!r} wanted"
            for name, want in wanted.items()
            if want is not None and found[name] != want
        ]
        if self.weights not in (teacher.weights, Path(teacher.weights).name):
            wrong.append(f"weights: {self.weights!r} here, {teacher.weights!r} wanted")
        return wrong


class TargetStore:
    """All target sets of one corpus, in one folder or below one URL."""

    def __init__(self, path: AnyPath, corpus_id: str, cache: Cache | None = None):
        self.path = path
        self.corpus_id = corpus_id
        self._cache = cache

    @classmethod
    def open(cls, path: str | AnyPath, corpus_id: str, cache: Cache | None = None) -> "TargetStore":
        """Open the store of a corpus; `cache` keeps what is read of targets in an object store.

        Raises:
            OlaError: no store there, one of another corpus, or written by another version of the layout.
        """
        path = as_path(path)
        file = path / "store.json"
        if not file.is_file():
            raise OlaError(f"{file}: no target store here; `python -m featurize run` makes it")
        try:
            found = json.loads(file.read_text())
            schema, corpus = found["schema"], found["corpus_id"]
        except (ValueError, KeyError, TypeError) as error:
            raise OlaError(f"{file}: not a store.json ({error!r})") from None
        if schema != SCHEMA_VERSION:
            raise OlaError(f"{file}: schema {schema!r}, this version reads {SCHEMA_VERSION}")
        if corpus != corpus_id:
            raise OlaError(f"{file}: these targets belong to corpus {corpus}, not to corpus {corpus_id}")
        return cls(path, corpus_id, cache)

    @classmethod
    def create(cls, path: str | AnyPath, corpus_id: str) -> "TargetStore":
        """Open the store of a corpus, making an empty one if there is none. Raises as `open` does."""
        content = {"schema": SCHEMA_VERSION, "corpus_id": corpus_id}
        ensure(as_path(path) / "store.json", json.dumps(content, indent=2).encode())
        return cls.open(path, corpus_id)

    def targets(self) -> list["TargetSet"]:
        """Every target set, by folder name."""
        files: Iterable[AnyPath] = self.path.glob("[!.]*/target.json")
        return [TargetSet(file.parent, self._cache) for file in sorted(files, key=str)]

    def add(self, identity: Identity, block: int, form: Format = "zarr") -> "TargetSet":
        """The target set of `identity`, made with `block` images per shard in this form if it is not there yet.

        Raises:
            OlaError: it is there with another block size, or in the other form; or it is being dropped.
        """
        folder = self.path / identity.folder
        content = {"identity": asdict(identity), "block": block, "format": form}
        if isinstance(folder, ObjectPath) and folder.name in leased(self.path / DROPPED):
            raise OlaError(f"{folder}: being dropped; if that was killed, `python -m featurize gc` ends it")
        ensure(folder / "target.json", json.dumps(content, indent=2).encode())
        (folder / "commits").mkdir(exist_ok=True)
        (folder / "leases").mkdir(exist_ok=True)
        found = TargetSet(folder)
        for name, here, wanted in (("block", found.block, block), ("format", found.format, form)):
            if here != wanted:
                raise OlaError(f"{folder}: made with featurize.{name}={here}, not {wanted}; keep that value")
        return found

    def find(self, task: str, teacher: TeacherConfig) -> "TargetSet":
        """The one set of `task` whose identity is what `teacher` states.

        Raises:
            OlaError: none, or several; the message says field by field what the store has and what is wanted.
        """
        sets = [s for s in self.targets() if s.identity.task == task]
        matching = [s for s in sets if not s.identity.differences(teacher)]
        if len(matching) == 1:
            return matching[0]
        if not sets:
            tasks = sorted({s.identity.task for s in self.targets()})
            raise OlaError(f"{self.path}: no {task!r} targets here; there are: {', '.join(tasks) or 'none'}")
        if not matching:
            found = " | ".join(f"{s.path.name}: {'; '.join(s.identity.differences(teacher))}" for s in sets)
            raise OlaError(f"{self.path}: no {task!r} targets of the teacher the pipeline states. {found}")
        first, *others = [asdict(s.identity) for s in matching]
        differing = [name for name in first if any(other[name] != first[name] for other in others)]
        found = " | ".join(
            f"{s.path.name}: {', '.join(f'{name}={asdict(s.identity)[name]!r}' for name in differing)}"
            for s in matching
        )
        raise OlaError(f"{self.path}: {len(matching)} sets of {task!r} targets fit, remove all but one. {found}")


class TargetSet:
    """One teacher's targets of one corpus."""

    def __init__(self, path: AnyPath, cache: Cache | None = None):
        self.path = path
        self._cache = cache
        file = path / "target.json"
        try:
            content = json.loads(file.read_text())
            self.identity = Identity.from_dict(content["identity"])
            self.block = int(content["block"])
            self.format: Format = content.get("format", "zarr")  # sets made before there was another do not say it
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OlaError(f"{file}: not a target.json ({error!r})") from None
        self._files = OpenFiles()

    def commit_file(self, tar: TarId) -> AnyPath:
        """Where the tar's commit is, once it is committed."""
        return self.path / "commits" / f"{tar.name}.parquet"

    def superseded_file(self, tar: TarId, content: str) -> AnyPath:
        """Where the tar's commit with that `content_hash` is kept when a retry of its failed images has replaced it."""
        return self.path / "superseded" / tar.name / f"{content}.parquet"

    def commit(self, tar: TarId, content: str | None = None) -> pa.Table | None:
        """The tar's commit (`COMMIT_SCHEMA`), or None if it is not committed, or was when it had another content.

        Args:
            tar: the tar.
            content: the `content_hash` of the commit file that is wanted, which may have been superseded since; its
                rows stay readable. Default: the commit that holds now.

        Raises:
            OlaError: the file is not a commit of this set.
        """
        for file in [self.commit_file(tar)] + ([] if content is None else [self.superseded_file(tar, content)]):
            try:
                data = file.read_bytes()
            except FileNotFoundError:
                continue
            if content is None or content_hash(data) == content:
                table = self.parse_commit(file, data)
                return table if table.schema.metadata[b"tar_hash"].decode() == tar.hash else None
        return None

    def parse_commit(self, file: AnyPath, data: bytes) -> pa.Table:
        """The table in a commit file's content; its metadata name the tar and the hash it had.

        Raises:
            OlaError: it is not a commit of this set; `file` is named.
        """
        try:
            table = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read()
        except (pa.ArrowException, OSError) as error:
            raise OlaError(f"{file}: cannot be read ({error}); `python -m featurize repair` makes it anew") from None
        digest = (table.schema.metadata or {}).get(b"digest", b"").decode()
        if not table.schema.equals(COMMIT_SCHEMA) or digest != self.identity.digest:
            raise OlaError(f"{file}: not a commit of {self.path.name}: digest {digest!r}, or other columns")
        return table

    def read(self, row: Mapping[str, Any], key: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
        """One image's target in new arrays: values and scales (or None), what `codec.decode` takes; see `read_into`."""
        stored = self.identity.layout
        values = np.empty(stored.shape, stored.dtype)
        scales = None if stored.scales_dtype is None else np.empty(stored.scales_shape, stored.scales_dtype)
        self.read_into(row, key, values, scales)
        return values, scales

    def read_into(
        self,
        row: Mapping[str, Any],
        key: str,
        values: np.ndarray[Any, Any],
        scales: np.ndarray[Any, Any] | None,
    ) -> None:
        """Read one image's target, straight from a disk into the arrays given. Safe to call from many threads.

        Args:
            row: the image's row of a commit, with status ``ok``.
            key: the sample the caller means to read; compared with the row's and covered by the checksum.
            values: contiguous, of the dtype and shape that the identity's `layout` says; what it held is lost.
            scales: likewise, where the codec has scales.

        Raises:
            OlaError: another key, an image without a target, missing or damaged bytes; naming the file and the key.
            Unreadable: an OlaError, too.
        """
        if row["key"] != key or row["status"] != "ok":
            raise OlaError(
                f"{self.path}: wanted the target of sample {key!r}, the commit's row is of {row['key']!r} "
                f"with status {row['status']!r} {row['reason'] or ''}".rstrip()
            )
        arrays = [values] if scales is None else [scales, values]
        if self._cache is None or not isinstance(self.path, ObjectPath):
            self._fill(row, key, values, scales)
        else:

            def fetch() -> bytes:
                self._fill(row, key, values, scales)
                return b"".join(array.tobytes() for array in arrays)

            name = f"{self.values_file(row['block'])} {row['values_offset']} {row['checksum']}"
            data = self._cache.read(name, fetch, good=lambda _: _checksum_of(key, values, scales) == row["checksum"])
            for array in arrays:
                array.reshape(-1).view(np.uint8)[:] = np.frombuffer(data, np.uint8, array.nbytes)
                data = data[array.nbytes :]
        if _checksum_of(key, values, scales) != row["checksum"]:
            raise OlaError(
                f"{self.values_file(row['block'])}: damaged: the target of sample {key!r}, image {row['image_index']}, "
                "has another checksum than its commit says; `python -m featurize verify` lists all such"
            )

    def values_file(self, block: int) -> AnyPath:
        """The shard object with a block's values."""
        if self.format == "webdataset":
            return self.path / "tars" / f"{block:06}.tar"
        return self._shard("values.zarr", block, self.identity.layout.shape)

    def scales_file(self, block: int) -> AnyPath:
        """The shard object with a block's scales."""
        if self.format == "webdataset":
            return self.values_file(block)
        return self._shard("scales.zarr", block, self.identity.layout.scales_shape)

    def _shard(self, array: str, block: int, shape: tuple[int, ...]) -> AnyPath:
        """A block's shard: Zarr names it by its place along every axis."""
        path = self.path / array / "c" / str(block)
        for _ in shape:
            path = path / "0"
        return path

    def _fill(
        self, row: Mapping[str, Any], key: str, values: np.ndarray[Any, Any], scales: np.ndarray[Any, Any] | None
    ) -> None:
        self._pread(self.values_file(row["block"]), values, row["values_offset"], key)
        if scales is not None:
            self._pread(self.scales_file(row["block"]), scales, row["scales_offset"], key)

    def _pread(self, file: AnyPath, array: np.ndarray[Any, Any], offset: int, key: str) -> None:
        try:
            count = self._files.readinto(file, array, offset)
        except FileNotFoundError:
            raise OlaError(f"{file}: missing, though the target of sample {key!r} is committed in it") from None
        except OSError as error:
            raise Unreadable(f"{file}: the target of sample {key!r} cannot be read ({error.strerror})") from None
        if count != array.nbytes:
            raise OlaError(
                f"{file}: cut short: of sample {key!r} at byte {offset}, {count} of {array.nbytes} bytes are there"
            )


def checksum(key: str, scales: bytes | np.ndarray[Any, Any], values: bytes | np.ndarray[Any, Any]) -> int:
    """Crc32c over key, scales and values: a target moved to another sample is as wrong as a damaged one."""
    crc = google_crc32c.extend(google_crc32c.value(key.encode()), scales)
    return int(google_crc32c.extend(crc, values))


def _checksum_of(key: str, values: np.ndarray[Any, Any], scales: np.ndarray[Any, Any] | None) -> int:
    return checksum(key, b"" if scales is None else scales, values)
