"""Byte ranges of many files for many threads: ``pread`` on descriptors of which the most recently used stay open, or
one range GET for an object in a store."""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from olavlm.data.objects import AnyPath, ObjectPath


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
    """Safe to share between threads; holds at most `limit` descriptors beyond those in use."""

    def __init__(self, limit: int = 128) -> None:
        self._limit = limit
        self._open: OrderedDict[AnyPath, _Descriptor | _Object] = OrderedDict()
        self._lock = threading.Lock()

    def pread(self, path: AnyPath, count: int, offset: int) -> bytes:
        """Up to `count` bytes at `offset`: no shared position, no lock held while reading.

        Raises:
            OSError: the file cannot be opened or read.
        """
        return self._opened(path).pread(count, offset)

    def readinto(self, path: AnyPath, array: np.ndarray[Any, Any], offset: int) -> int:
        """Fill a contiguous array with the bytes from `offset` on; how many of them there were. Raises as `pread`."""
        return self._opened(path).readinto(array, offset)

    def size(self, path: AnyPath) -> int:
        """Bytes of the file as it was opened; as cheap as a lookup once something was read of it."""
        return self._opened(path).size

    def _opened(self, path: AnyPath) -> "_Descriptor | _Object":
        with self._lock:
            opened = self._open.get(path) or (_Object(path) if isinstance(path, ObjectPath) else _Descriptor(path))
            self._open[path] = opened
            self._open.move_to_end(path)
            if len(self._open) > self._limit:
                self._open.popitem(last=False)
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
