"""Byte ranges of many files for many threads: ``pread`` on descriptors of which the most recently used stay open, or
one range GET for an object in a store."""

import errno
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from olavlm.data.objects import AnyPath, ObjectPath

T = TypeVar("T")

#: Files that stay open in a process, whatever the number of corpora and target sets it reads: half of what the
#: strictest usual system allows (macOS: 256).
STAY_OPEN = 128


class Listed(NamedTuple):
    """A file as a listing of its folder has it."""

    name: str
    size: int
    time: int  # of its last change, nanoseconds


def listing(folder: AnyPath) -> Iterator[Listed]:
    """The files in a folder, or the objects below a prefix, in no order; none of them is opened."""
    if isinstance(folder, ObjectPath):
        yield from (Listed(path.name, stat.st_size, int(stat.st_mtime * 1e9)) for path, stat in folder.scan())
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # removed meanwhile
                stat = entry.stat()
                yield Listed(entry.name, stat.st_size, stat.st_mtime_ns)


class OpenFiles:
    """The files one reader has open. Safe to share between threads.

    All readers of the process together hold at most `STAY_OPEN` descriptors beyond those in use; a reader that is gone
    holds none.
    """

    _used: ClassVar[OrderedDict[tuple["weakref.ref[OpenFiles]", AnyPath], None]] = OrderedDict()  # the last one last
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self) -> None:
        self._open: dict[AnyPath, _Descriptor | _Object] = {}

    def pread(self, path: AnyPath, count: int, offset: int) -> bytes:
        """Up to `count` bytes at `offset`: no shared position, no lock held while reading.

        Raises:
            OSError: the file cannot be opened or read.
        """
        return self._read(path, lambda opened: opened.pread(count, offset))

    def readinto(self, path: AnyPath, array: np.ndarray[Any, Any], offset: int) -> int:
        """Fill a contiguous array with the bytes from `offset` on; how many of them there were. Raises as `pread`."""
        return self._read(path, lambda opened: opened.readinto(array, offset))

    def size(self, path: AnyPath) -> int:
        """Bytes of the file as it was opened; as cheap as a lookup once something was read of it."""
        return self._opened(path).size

    def _read(self, path: AnyPath, read: Callable[["_Descriptor | _Object"], T]) -> T:
        try:
            return read(self._opened(path))
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            self._open.pop(path, None)  # NFS: another machine put a file of this name in the place of ours
            return read(self._opened(path))

    def _opened(self, path: AnyPath) -> "_Descriptor | _Object":
        opened = self._open.get(path) or (_Object(path) if isinstance(path, ObjectPath) else _Descriptor(path))
        used = weakref.ref(self), path
        with self._lock:
            self._open[path] = opened
            self._used[used] = None
            self._used.move_to_end(used)
            while len(self._used) > STAY_OPEN:
                (owner, oldest), _ = self._used.popitem(last=False)
                if (reader := owner()) is not None:
                    reader._open.pop(oldest, None)
        return opened


class _Descriptor:
    """Lives as long as somebody holds it, so that evicting it cannot close it under a reader."""

    def __init__(self, path: Path) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self.fd).st_size

    def pread(self, count: int, offset: int) -> bytes:
        return os.pread(self.fd, count, offset)

    def readinto(self, array: np.ndarray[Any, Any], offset: int) -> int:
        return os.preadv(self.fd, [array.data], offset)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class _Object:
    """An object of a store; every answer says its size, so that asking for it costs a request only before the first."""

    def __init__(self, path: ObjectPath) -> None:
        self._path = path
        self._size: int | None = None

    @property
    def size(self) -> int:
        if self._size is None:
            self._size = self._path.stat().st_size
        return self._size

    def pread(self, count: int, offset: int) -> bytes:
        data, self._size = self._path.pread(count, offset)
        return data

    def readinto(self, array: np.ndarray[Any, Any], offset: int) -> int:
        data = self.pread(array.nbytes, offset)
        array.reshape(-1).view(np.uint8)[: len(data)] = np.frombuffer(data, np.uint8)
        return len(data)
