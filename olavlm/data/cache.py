"""A bounded copy, on a local disk, of the byte ranges that were read from an object store.

    used             bytes promised to the files here, in decimal; locked while it is changed
    3f/<30 hex>      one range: crc32c, then its bytes

Any number of processes and threads may share a folder. A file appears whole or not at all, and one that a power cut
tore is found out by its crc32c and fetched again. Room is promised before a file is written, so that a killed process
can make the folder look fuller than it is, never the other way round.

Nothing is evicted: an epoch reads every sample once, in a new order, so that what is there is worth as much as what
would replace it, and a full cache goes on serving its share. To make room for other data, remove the folder.
"""

import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path

import google_crc32c

from olavlm.errors import OlaError

_PAGE = 4096  # what a file takes of a disk is a multiple of it


class Cache:
    """The ranges kept in one folder; safe to share between threads."""

    def __init__(self, folder: Path, limit: int) -> None:
        """Open a folder, or make it.

        Args:
            folder: on a local disk.
            limit: bytes that its files may take.

        Raises:
            OlaError: it cannot be made or written.
        """
        self._folder, self._limit = folder, limit
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._used():
                pass
        except OSError as error:
            raise OlaError(f"cache.folder: {folder} cannot be used ({error.strerror})") from None

    def read(self, name: str, fetch: Callable[[], bytes], good: Callable[[bytes], bool]) -> bytes:
        """The range of that name: from the disk, or fetched, and then kept if it is good and there is room.

        Args:
            name: says all that the bytes depend on; whoever asks for the same name wants the same bytes.
            fetch: gets the bytes where they are from; may raise.
            good: whether fetched bytes are what they should be; others are not kept, so that mending them helps.
        """
        digest = blake2b(name.encode(), digest_size=16).hexdigest()
        file = self._folder / digest[:2] / digest[2:]
        with suppress(OSError):
            kept = file.read_bytes()
            if kept[:4] == _crc(kept[4:]):
                return kept[4:]
        data = fetch()
        if good(data) and self._promise(len(data) + 4):
            _write(file, _crc(data) + data)
        return data

    def _promise(self, count: int) -> bool:
        """Set room for a file of `count` bytes aside, if there is any."""
        with suppress(OSError), self._used() as (used, change):
            used += -(-count // _PAGE) * _PAGE
            if used <= self._limit:
                change(used)
                return True
        return False

    @contextmanager
    def _used(self) -> Iterator[tuple[int, Callable[[int], None]]]:
        """Bytes promised so far, and how to change that; nobody else does meanwhile."""
        descriptor = os.open(self._folder / "used", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)

            def change(used: int) -> None:
                os.pwrite(descriptor, b"%20d" % used, 0)

            try:
                used = int(os.pread(descriptor, 20, 0))
            except ValueError:  # new, or lost by a power cut
                used = sum(-(-file.stat().st_size // _PAGE) * _PAGE for file in self._folder.glob("??/*"))
                change(used)
            yield used, change
        finally:
            os.close(descriptor)


def _crc(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")


def _write(file: Path, data: bytes) -> None:
    """Write a file whole or, on a full disk, not at all; unlike `olavlm.data.atomic`, without waiting for fsync."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        file.parent.mkdir(exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, file)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
