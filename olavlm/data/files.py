"""Byte ranges of many files for many threads: ``pread`` on descriptors of which the most recently used stay open."""

import os
import threading
from collections import OrderedDict
from pathlib import Path


class OpenFiles:
    """Safe to share between threads; holds at most `limit` descriptors beyond those in use."""

    def __init__(self, limit: int = 128) -> None:
        self._limit = limit
        self._open: OrderedDict[Path, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def pread(self, path: Path, count: int, offset: int) -> bytes:
        """Up to `count` bytes at `offset`: no shared position, no lock held while reading.

        Raises:
            OSError: the file cannot be opened or read.
        """
        descriptor = self._descriptor(path)  # a name of its own keeps it open until the read is done
        return os.pread(descriptor.fd, count, offset)

    def size(self, path: Path) -> int:
        """Bytes of the file as it was opened; as cheap as a lookup once it is open."""
        return self._descriptor(path).size

    def _descriptor(self, path: Path) -> "_Descriptor":
        with self._lock:
            descriptor = self._open.get(path) or _Descriptor(path)
            self._open[path] = descriptor
            self._open.move_to_end(path)
            if len(self._open) > self._limit:
                self._open.popitem(last=False)
        return descriptor


class _Descriptor:
    """Lives as long as somebody holds it, so that evicting it cannot close it under a reader."""

    def __init__(self, path: Path) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self.fd).st_size

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
