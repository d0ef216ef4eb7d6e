"""Folders that are there in full or not at all: filled beside their final name, fsynced, then renamed."""

import errno
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from olavlm.errors import OlaError


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it gets the name `path` when the block ends and vanishes if the block raises.

    Until then it lies beside `path` as ``.{name}.{pid}-{token}.tmp``. A killed writer leaves only that behind; the next
    one removes it.

    Args:
        path: absent, or an empty folder.

    Raises:
        OlaError: there is something at `path`.
        OSError: the disk is full (safetensors' own error for it becomes the operating system's).
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise OlaError(f"{path}: already there; give a new folder, or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*-*.tmp"):
        shutil.rmtree(leftover)
    temporary = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        for file in (*temporary.rglob("*"), temporary):
            fsync(file)
        os.rename(temporary, path)
    except SafetensorError as error:
        if "No space left" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
