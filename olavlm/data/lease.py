"""One writer per tar and target set: an exclusive, heart-beaten, fenced lease in the file system.

``leases/<tar>.<generation>`` says who the writer is; the highest generation is the holder, its heart the file's mtime.
Whoever finds a dead holder takes over by creating the next generation exclusively.

Fencing: a writer first lays down its temporary file, then calls `Lease.check`, then links or renames; a taker first
creates its lease, then sweeps the temporary files of whatever it is going to publish. So a writer that wakes up after a
takeover fails at the check or at the rename, and can never touch what its successor publishes.

An object store has neither temporary files nor a rename, and needs no fence: there a writer only ever creates objects
that were not there (``If-None-Match: *``), or adds to the very version that it read (``If-Match``), so that the worst a
writer waking up late can do is to write what its successor was about to, which is then taken as it is
(`olavlm.data.commit`, `olavlm.data.amend`). There the lease saves work.
Its heart beats by ``If-Match``: a lease that was taken over and removed does not come back.
"""

import glob
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from olavlm.data.atomic import publish, sweep
from olavlm.data.objects import AnyPath, ObjectPath

STALE = 60.0  # seconds without a heartbeat after which a holder on another host counts as dead
_BEAT = 10.0


class LeaseLost(Exception):
    """Another writer took the tar over; whatever this one still wants to publish must not appear."""


class Lease:
    """Held from `acquire` until `release`; usable as a context manager.

    Attributes:
        inherited: whether it was taken over from a holder that died.
    """

    def __init__(self, path: AnyPath, content: bytes, inherited: bool):
        self.path, self.inherited = path, inherited
        self._content = content
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, name=f"lease {path.name}", daemon=True)
        self._heart.start()

    @classmethod
    def acquire(cls, folder: AnyPath, name: str) -> "Lease | None":
        """Take the lease called `name` in `folder`; None while somebody else holds it."""
        generation = 0
        held = _generations(folder, name)
        if held:
            generation = max(held)
            if not _stale(held[generation]):
                return None
        path = folder / f"{name}.{generation + 1}"
        content = f"{_host()} {os.getpid()} {secrets.token_hex(8)}".encode()
        try:
            publish(path, content)
        except (FileExistsError, FileNotFoundError):
            return None  # somebody was faster (and swept our temporary file)
        for leftover in (path, *held.values()):
            sweep(leftover)
        return cls(path, content, bool(held))

    @staticmethod
    def held(folder: AnyPath, name: str) -> bool:
        """Whether somebody alive holds the lease called `name`; by the time this returns it may be over."""
        generations = _generations(folder, name)
        return bool(generations) and not _stale(generations[max(generations)])

    def check(self) -> None:
        """Raise `LeaseLost` unless this is still the highest generation."""
        try:
            held = _generations(self.path.parent, self.path.name.rpartition(".")[0])
            if held[max(held)] == self.path and self.path.read_bytes() == self._content:
                return
        except (ValueError, FileNotFoundError):
            pass
        raise LeaseLost(f"{self.path}: taken over by another writer")

    def release(self) -> None:
        """Give it up: older generations go first, so that none of their holders ever looks like the highest."""
        self._released.set()
        self._heart.join()
        try:
            self.check()
        except LeaseLost:
            return
        name, _, own = self.path.name.rpartition(".")
        held = _generations(self.path.parent, name)
        for generation in sorted(g for g in held if g <= int(own)):
            held[generation].unlink(missing_ok=True)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Held beyond the block; but left behind if that raises, as nobody would do it later and the heart beats on.

        Left behind, not given up: the next holder then inherits it, and sweeps what this one may not have swept.
        """
        try:
            yield
        except BaseException:
            if isinstance(self.path, ObjectPath):  # where nothing is swept
                self.release()
            else:
                self._released.set()
                self._heart.join()
                with suppress(OSError):  # then it is dead a minute later
                    os.utime(self.path, (0, 0))
            raise

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _beat(self) -> None:
        version = None
        while not self._released.wait(_BEAT):
            try:
                if not isinstance(self.path, ObjectPath):
                    os.utime(self.path)
                    continue
                if version is None:
                    version = self.path.version()
                    self.check()  # afterwards: so it is the version of what this writer wrote
                version = self.path.update(self._content, version)
            except (FileNotFoundError, LeaseLost):
                return  # taken over and finished by another
            except OSError:
                continue  # the network or the disk may be back at the next beat


def leased(folder: AnyPath) -> list[str]:
    """The names of all leases that are there, held or left behind."""
    return sorted({path.name.rpartition(".")[0] for path in folder.glob("[!.]*.*")})


def _generations(folder: AnyPath, name: str) -> dict[int, AnyPath]:
    """Every generation of a lease that is there."""
    found: dict[int, AnyPath] = {}
    for path in folder.glob(f"{glob.escape(name)}.*"):
        stem, _, generation = path.name.rpartition(".")
        if stem == name and generation.isdigit():
            found[int(generation)] = path
    return found


def _stale(path: AnyPath) -> bool:
    """Whether the holder is dead: its process is gone (same host), or its heart has stopped (any host)."""
    try:
        host, pid, _ = path.read_text().split()
        # Ages are taken by the file system's clock: two hosts' clocks may differ by more than a minute.
        probe = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        if now - path.stat().st_mtime > STALE:
            return True
    except FileNotFoundError:
        return False  # just released; whoever asks comes back
    return host == _host() and not _alive(int(pid))


def _host() -> str:
    """This host, this boot, this process namespace: where a pid means something."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}:{boot}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _alive(pid: int) -> bool:
    """Whether the process exists and is more than an unreaped zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return True
