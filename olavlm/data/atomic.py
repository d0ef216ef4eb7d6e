"""Files that are there in full or not at all: written beside their final name, fsynced, then linked or renamed.

The temporary file of ``name`` is ``.{name}.{pid}-{token}.tmp`` beside it; a killed writer leaves only that behind.
In an object store every write is whole or absent by itself: there is no temporary file, and nothing to sweep.
"""

import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from olavlm.data.objects import AnyPath, ObjectPath

Check = Callable[[], None]

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.\d+-[0-9a-f]+\.tmp")


def publish(path: AnyPath, data: bytes, check: Check | None = None) -> None:
    """Create `path` with `data`, never overwriting.

    Args:
        path: the final name; its folder is created if absent.
        data: the whole content.
        check: called when the temporary file is on the disk, right before the final name appears; raises to stop it.

    Raises:
        FileExistsError: `path` is there already (whatever its content).
        OSError: the disk is full (its ``filename`` is `path`), or the temporary file was removed under us.
    """
    if isinstance(path, ObjectPath):
        if check:
            check()
        path.create(data)
        return
    with _written(path, data) as temporary:
        if check:
            check()
        os.link(temporary, path)


def replace(path: AnyPath, data: bytes, check: Check | None = None) -> None:
    """Set the content of `path` to `data`; a reader sees the old content or the new one. Arguments as in `publish`."""
    if isinstance(path, ObjectPath):
        if check:
            check()
        path.put(data)
        return
    with _written(path, data) as temporary:
        if check:
            check()
        os.replace(temporary, path)


def ensure(path: AnyPath, data: bytes) -> None:
    """Create `path` with `data` unless it is there, and sweep what dead writers left; any number may do so at once."""
    sweep(path)
    while not path.exists():
        with suppress(FileExistsError, FileNotFoundError):  # somebody else made it, or swept our temporary file
            publish(path, data)


def sweep(*paths: AnyPath) -> None:
    """Remove the temporary files that dead (or fenced-off) writers of `paths` left behind; lists every folder once.

    A writer that is still alive then fails at its ``link`` or ``rename``, so that it cannot touch its path any more.
    """
    names: dict[Path, set[str]] = {}
    for path in paths:
        if not isinstance(path, ObjectPath):
            names.setdefault(path.parent, set()).add(path.name)
    for folder, swept in names.items():
        for leftover in folder.glob(".*.tmp"):
            if written_as(leftover.name) in swept:
                leftover.unlink(missing_ok=True)


def written_as(name: str) -> str | None:
    """The name of the file that a temporary file is to become; None if `name` is not one's."""
    temporary = _TEMPORARY.fullmatch(name)
    return temporary["name"] if temporary else None


@contextmanager
def _written(path: Path, data: bytes) -> Iterator[Path]:
    """`data` in a fsynced temporary file beside `path`; gone afterwards, and the folder fsynced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            error.filename = error.filename or str(path)  # write() does not say which file did not fit
            raise
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(folder)
