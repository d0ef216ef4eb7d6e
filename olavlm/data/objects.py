"""Paths that may be URLs: a place on a disk, or an object in a store (``s3://bucket/key``).

`ObjectPath` has those methods of `pathlib.Path` that corpora and target stores need, so that most code does not know
which of the two it holds; `AnyPath` is either. Only what must be atomic or fast looks: `olavlm.data.atomic`,
`olavlm.data.lease`, `olavlm.data.files` and the writer of `olavlm.data.commit`.

The client is obstore, an optional extra: its reads and writes release the GIL, it has no event loop between threads
and sockets, no cache of listings that leases could fall for, and both conditional writes (``If-None-Match: *``,
``If-Match``). Endpoint, region and credentials come from ``AWS_ENDPOINT_URL`` and the other ``AWS_*`` variables, or
from the machine's role.
"""

import errno
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from olavlm.errors import OlaError

if TYPE_CHECKING:
    from obstore import Attributes, ListResult, ObjectMeta, UpdateVersion
    from obstore.store import S3Store

_SCHEME = "s3://"
_READ_AHEAD = 1 << 23


class Stat(NamedTuple):
    """What `os.stat_result` says, as far as objects have it."""

    st_size: int
    st_mtime: float  # by the store's clock, in whole seconds


class Content(NamedTuple):
    """An object as it was when it was read."""

    data: bytes
    notes: dict[str, str]  # that it was written with, among the store's own
    version: str  # what `ObjectPath.update` takes


@dataclass(frozen=True, order=True)
class ObjectPath:
    """An object, or a prefix of objects' names. Any number of threads may use it; it holds no connection.

    Every method that talks to the store raises `FileNotFoundError` where `pathlib.Path` does, and another `OSError`
    with the store's own words if it cannot be reached or refuses.
    """

    bucket: str
    key: str  # without slashes at its ends; empty: the bucket itself

    def __str__(self) -> str:
        return f"{_SCHEME}{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: str) -> "ObjectPath":
        return ObjectPath(self.bucket, "/".join(part for part in (self.key, name) if part))

    @property
    def name(self) -> str:
        """The last part."""
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The last part without its extension."""
        return self.name.rpartition(".")[0] or self.name

    @property
    def parent(self) -> "ObjectPath":
        """All but the last part."""
        return ObjectPath(self.bucket, self.key.rpartition("/")[0])

    def is_absolute(self) -> bool:
        """Always."""
        return True

    def resolve(self) -> "ObjectPath":
        """Itself: there is no working directory and no link."""
        return self

    absolute = resolve

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a prefix is there with its first object."""

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    exists = is_file

    def is_dir(self) -> bool:
        """Whether there is any object below this prefix."""
        with _told(self):
            return bool(next(iter(_store(self.bucket).list(self.key or None, chunk_size=1)), []))

    def stat(self) -> Stat:
        """Size and time."""
        with _told(self):
            found = _store(self.bucket).head(self.key)
        return Stat(found["size"], found["last_modified"].timestamp())

    def scan(self) -> Iterator[tuple["ObjectPath", Stat]]:
        """The objects right below this prefix, in no order: one listing, no object is read."""
        yield from (self._listed(entry) for entry in self._below()["objects"])

    def walk(self) -> Iterator[tuple["ObjectPath", Stat]]:
        """The objects below this prefix, however deep, in no order."""
        for page in self._pages():
            yield from (self._listed(entry) for entry in page)

    def iterdir(self) -> Iterator["ObjectPath"]:
        """The objects and the prefixes right below this prefix, in no order."""
        found = self._below()
        yield from (ObjectPath(self.bucket, prefix.rstrip("/")) for prefix in found["common_prefixes"])
        yield from (ObjectPath(self.bucket, entry["path"]) for entry in found["objects"])

    def glob(self, pattern: str) -> Iterator["ObjectPath"]:
        """The objects a pattern like ``*/target.json`` or ``a.*`` matches, in no order; one listing per prefix."""
        first, _, rest = pattern.partition("/")
        if rest:
            prefixes = [ObjectPath(self.bucket, prefix.rstrip("/")) for prefix in self._below()["common_prefixes"]]
            for prefix in prefixes:
                if fnmatchcase(prefix.name, first):
                    yield from prefix.glob(rest)
            return
        yield from (path for path, _ in self.scan() if fnmatchcase(path.name, first))

    def read_bytes(self) -> bytes:
        """The whole object."""
        return self.read().data

    def read_text(self) -> str:
        """The whole object, which is UTF-8."""
        return self.read_bytes().decode()

    def read(self) -> Content:
        """The whole object, its notes and its version."""
        with _told(self):
            found = _store(self.bucket).get(self.key)
            notes = {str(name): str(value) for name, value in found.attributes.items()}
            return Content(bytes(found.bytes()), notes, str(found.meta["e_tag"]))

    def pread(self, count: int, offset: int) -> tuple[bytes, int]:
        """Up to `count` bytes at `offset`, and the size of the object: one request."""
        if count <= 0:
            return b"", self.stat().st_size
        try:
            with _told(self):
                found = _store(self.bucket).get(self.key, options={"range": (offset, offset + count)})
                return bytes(found.bytes()), found.meta["size"]
        except FileNotFoundError:
            raise
        except OSError:
            size = self.stat().st_size
            if offset < size:
                raise
            return b"", size  # a range that begins behind the end is an error here, and nothing to `os.pread`

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """The object for reading from start to end, several megabytes a request."""
        assert mode == "rb"
        return io.BufferedReader(_Reader(self), _READ_AHEAD)

    def create(self, data: bytes, notes: Mapping[str, str] | None = None) -> None:
        """Create the object with `data`, whole and never overwriting (``If-None-Match: *``).

        Args:
            data: the content.
            notes: kept beside it, for `read`.

        Raises:
            FileExistsError: there is one of this name already.
        """
        self._put(data, "create", notes)

    def put(self, data: bytes) -> None:
        """Set the content of the object; a reader sees the old content or the new one."""
        self._put(data, "overwrite")

    def touch(self) -> None:
        """An empty object, of now."""
        self.put(b"")

    def version(self) -> str:
        """What `update` takes: the object's entity tag."""
        with _told(self):
            return str(_store(self.bucket).head(self.key)["e_tag"])

    def update(self, data: bytes, version: str, notes: Mapping[str, str] | None = None) -> str:
        """Set content and notes of exactly this version of the object (``If-Match``); the version it then has.

        Raises:
            FileNotFoundError: that version is gone: the object was removed, or has another content.
        """
        with _told(self):
            mode: UpdateVersion = {"e_tag": version}
            attributes: Attributes = dict(notes or {})
            put = _store(self.bucket).put(self.key, data, mode=mode, attributes=attributes, use_multipart=False)
            return str(put["e_tag"])

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object."""
        if not missing_ok:
            self.stat()
        with _told(self):
            _store(self.bucket).delete(self.key)

    def rmtree(self, check: Callable[[], None] = lambda: None) -> None:
        """Remove every object below this prefix, many at a time; `check` is called before each time."""
        for page in self._pages():
            check()
            with _told(self):
                _store(self.bucket).delete([entry["path"] for entry in page])

    def _below(self) -> "ListResult[Sequence[ObjectMeta]]":
        """What lies right below this prefix."""
        with _told(self):
            return _store(self.bucket).list_with_delimiter(self.key or None)

    def _pages(self) -> Iterator["Sequence[ObjectMeta]"]:
        """The objects below this prefix, however deep, as many at a time as the store lists and removes at once."""
        with _told(self):
            yield from _store(self.bucket).list(self.key or None, chunk_size=1000)

    def _listed(self, entry: "ObjectMeta") -> tuple["ObjectPath", Stat]:
        return ObjectPath(self.bucket, entry["path"]), Stat(entry["size"], entry["last_modified"].timestamp())

    def _put(self, data: bytes, mode: Literal["create", "overwrite"], notes: Mapping[str, str] | None = None) -> None:
        try:
            with _told(self):
                attributes: Attributes = dict(notes or {})
                _store(self.bucket).put(self.key, data, mode=mode, attributes=attributes, use_multipart=False)
        except FileNotFoundError:  # a write that expects no object misses nothing but the bucket
            raise OlaError(f"{self}: there is no bucket {self.bucket!r}") from None


AnyPath = Path | ObjectPath


def as_path(path: str | AnyPath) -> AnyPath:
    """A path or URL as what it is.

    Raises:
        OlaError: a URL of another kind than ``s3://bucket/key``.
    """
    text = str(path)
    if not isinstance(path, str) or "://" not in text:
        return path if isinstance(path, ObjectPath) else Path(path)
    bucket, _, key = text.removeprefix(_SCHEME).rstrip("/").partition("/")
    if not text.startswith(_SCHEME) or not bucket or any(part in {"", ".", ".."} for part in key.split("/") if key):
        raise OlaError(f"{text}: expected a local path, or a URL like s3://bucket/folder")
    return ObjectPath(bucket, key)


def join(folder: AnyPath, path: str) -> AnyPath:
    """`path` as seen from `folder`: an absolute path or a URL stands for itself."""
    return as_path(path) if "://" in path or Path(path).is_absolute() else folder / path


def local_path(path: str) -> Path:
    """A path that must be on a disk, because a corpus is to be made there.

    Raises:
        OlaError: it is a URL.
    """
    if "://" in path:
        raise OlaError(
            f"{path}: corpora are made on a local disk; make it in a folder, upload that (`aws s3 cp --recursive`), "
            "and give the URL to what reads it"
        )
    return Path(path)


class _Reader(io.RawIOBase):
    """An object as a seekable stream."""

    def __init__(self, path: ObjectPath) -> None:
        self._path, self._position, self._size = path, 0, path.stat().st_size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = min(len(buffer), self._size - self._position)
        if count <= 0:
            return 0
        data, _ = self._path.pread(count, self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


@lru_cache
def _store(bucket: str) -> "S3Store":
    """The client of a bucket, shared by all threads of the process."""
    try:
        from obstore.store import S3Store
    except ImportError:
        raise OlaError(f"{_SCHEME}{bucket}: reading object stores needs an extra: `pip install .[s3]`") from None
    plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http:")
    return S3Store(bucket, client_options={"allow_http": plain, "timeout": "5 minutes"})


@contextmanager
def _told(path: ObjectPath) -> Iterator[None]:
    """The store's errors as the operating system's."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
    except Exception as error:
        kind = type(error).__name__
        if kind == "AlreadyExistsError":
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        if kind == "PreconditionError":
            raise FileNotFoundError(errno.ENOENT, "this version of the object is gone", str(path)) from None
        if type(error).__module__.startswith("obstore"):
            raise OSError(errno.EIO, str(error).splitlines()[0], str(path)) from None
        raise
