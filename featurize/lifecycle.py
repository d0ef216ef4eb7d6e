"""Looking after stores: repair what is damaged, drop a set, collect what no commit lists, compact the commits.

All of it may run beside jobs and readers and be killed at any moment: whatever a writer may be at is done under its
tar's lease, and the same command run again goes on.
"""

import glob
import os
import re
import secrets
import shutil
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from featurize.progress import track
from featurize.stage import Job, open_jobs
from featurize.verify import Finding, verify, verify_tar
from olavlm.config import PipelineConfig
from olavlm.data.atomic import sweep
from olavlm.data.commit import blocks, first_blocks
from olavlm.data.corpus import Corpus, Tar
from olavlm.data.lease import Lease, leased
from olavlm.data.objects import AnyPath, ObjectPath, as_path
from olavlm.data.targets import TargetSet, TargetStore
from olavlm.errors import OlaError

_DEAD, _UNLISTED = "left by a dead writer", "no commit lists it"
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.\d+-[0-9a-f]+\.tmp")


# ---- repair


def withdraw_damaged(config: PipelineConfig, recompute: int = 0) -> Iterator[tuple[Finding, bool]]:
    """Take back every commit that `verify` finds something wrong with, so that a run computes its tar again.

    Args:
        config: the pipeline.
        recompute: as of `verify`.

    Yields:
        What is wrong, and whether a run will make it good; it will not while another writer is at the tar.
    """
    jobs = {job.name: job for job in open_jobs(config)}
    withdrawn: dict[tuple[str, str, Tar], bool] = {}
    for finding in verify(config, recompute):
        if finding.tar is None:
            yield finding, True
            continue
        place = finding.data, finding.task, finding.tar
        if place not in withdrawn:
            withdrawn[place] = _withdraw(jobs[finding.data], finding)
        yield finding, withdrawn[place]


def _withdraw(job: Job, finding: Finding) -> bool:
    """Remove a tar's commit, and the ones it superseded; unless another repair has made it good meanwhile."""
    task, tar = finding.task, finding.tar
    assert tar is not None
    folder = on_disk(job.sets[task].path)
    target = TargetSet(folder)  # one that has no file open
    lease = Lease.acquire(folder / "leases", tar.name)
    if lease is None:
        return False
    with lease:
        sweep(target.commit_file(tar))
        if finding.recomputed or any(verify_tar(replace(job, sets={task: target}), task, tar)):
            shutil.rmtree(folder / "superseded" / tar.name, ignore_errors=True)
            target.commit_file(tar).unlink(missing_ok=True)
    return True


# ---- drop


def find_sets(config: PipelineConfig, name: str) -> list[TargetSet]:
    """The target sets called `name` (a task, or a set's folder) in the pipeline's stores, one per store at most.

    Raises:
        OlaError: there is none, or a store has several sets of that task.
    """
    found: dict[AnyPath, TargetSet] = {}
    names: set[str] = set()
    for store, _ in open_stores(config):
        sets = store.targets()
        names |= {target.path.name for target in sets}
        matching = [target for target in sets if name in (target.path.name, target.identity.task)]
        if len(matching) > 1:
            several = ", ".join(target.path.name for target in matching)
            raise OlaError(f"{store.path}: {len(matching)} sets of {name!r}, name one of them: {several}")
        found |= {target.path: target for target in matching}
    if not found:
        raise OlaError(
            f"pipeline {config.name}: no target set {name!r}; there are: {', '.join(sorted(names)) or 'none'}"
        )
    return list(found.values())


def drop(target: TargetSet) -> None:
    """Remove a target set: it is gone at once, its bytes as fast as they can be removed (`gc` ends what was killed).

    Raises:
        OlaError: somebody is writing to it.
    """
    folder = on_disk(target.path)
    busy = [name for name in leased(folder / "leases") if Lease.held(folder / "leases", name)]
    if busy:
        raise OlaError(
            f"{target.path}: a job is at tar {busy[0]}{' and others' * (len(busy) > 1)}; stop it, or wait a minute if "
            "it was killed on another machine"
        )
    gone = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def size(folder: Path) -> int:
    """Bytes of the files in a folder, or of one file."""
    files = (folder, *folder.rglob("*"))
    return sum(file.stat().st_size for file in files if file.is_file())


# ---- gc


@dataclass(frozen=True)
class Garbage:
    """A file or folder that no commit lists."""

    path: Path
    why: str
    bytes: int


def gc(config: PipelineConfig, dry_run: bool = False) -> Iterator[Garbage]:
    """Remove from every store of the pipeline, whatever the set, what no commit lists and no living writer is at.

    Yields:
        What is removed, or would be.
    """
    for store, corpus in open_stores(config):
        for path in sorted(on_disk(store.path).iterdir()):
            if _TEMPORARY.fullmatch(path.name):
                yield from _remove(path, "left by a killed drop" if path.is_dir() else _DEAD, dry_run)
        for target in store.targets():
            yield from _collect(target, corpus, dry_run)


def _collect(target: TargetSet, corpus: AnyPath, dry_run: bool) -> Iterator[Garbage]:
    leases = on_disk(target.path) / "leases"
    loose, of_tar = _candidates(target, corpus)
    for path, why in loose:
        yield from _remove(path, why, dry_run)
    for name in track(sorted({*of_tar, *leased(leases)}), f"{target.path.name}: gc"):
        if Lease.held(leases, name):
            continue
        for path in sorted(leases.glob(f"{glob.escape(name)}.*")):
            if path.name.rpartition(".")[0] == name:
                yield Garbage(path, "lease of a dead writer", size(path))
        lease = None if dry_run else Lease.acquire(leases, name)
        if lease is None and not dry_run:
            continue  # somebody has just come
        try:
            committed = (target.path / "commits" / f"{name}.parquet").exists()
            for path, why in of_tar.get(name, []):
                if path.exists() and not (why == _UNLISTED and committed):
                    yield from _remove(path, why, dry_run)
        finally:
            if lease:
                lease.release()


Candidates = list[tuple[Path, str]]  # what may go, and why


def _candidates(target: TargetSet, corpus: AnyPath) -> tuple[Candidates, dict[str, Candidates]]:
    """What may be removed of a set at once, and what by tar, whose lease it takes to be sure."""
    folder = on_disk(target.path)
    arrays = [folder / "tars"] if target.format == "webdataset" else sorted(folder.glob("*.zarr"))
    pattern = "[!.]*.tar" if target.format == "webdataset" else "c/*"
    found_blocks = [(path, int(path.stem)) for array in arrays for path in sorted(array.glob(pattern))]
    committed = {file.stem for file in (folder / "commits").glob("[!.]*.parquet")}
    tars = Corpus.open(corpus).tars  # after the blocks, so that it knows the tars of all of them
    starts = first_blocks([tar.images for tar in tars], target.block)
    owners = [(start, tar) for start, tar in zip(starts, tars, strict=True) if tar.images]
    end = sum(blocks(tar.images, target.block) for tar in tars)
    loose: Candidates = []
    of_tar: dict[str, Candidates] = {}
    for place in (folder, folder / "leases", *arrays):
        loose += [(path, _DEAD) for path in sorted(place.glob(".*")) if _TEMPORARY.fullmatch(path.name)]
    for path in sorted((folder / "commits").glob(".*")):
        if temporary := _TEMPORARY.fullmatch(path.name):
            of_tar.setdefault(temporary["name"].removesuffix(".parquet"), []).append((path, _DEAD))
    for kept in sorted((folder / "superseded").glob("*")):
        found = [(path, _DEAD) for path in sorted(kept.iterdir()) if _TEMPORARY.fullmatch(path.name)]
        of_tar.setdefault(kept.name, []).extend(found if kept.name in committed else [(kept, _UNLISTED)])
    for path, block in found_blocks:
        if block >= end:
            loose.append((path, "block of no tar"))
            continue
        name = owners[bisect_right(owners, block, key=lambda owner: owner[0]) - 1][1].name
        found = [(left, _DEAD) for left in sorted(path.rglob(".*")) if _TEMPORARY.fullmatch(left.name)]
        of_tar.setdefault(name, []).extend(found if name in committed else [(path, _UNLISTED)])
    return loose, {name: found for name, found in of_tar.items() if found}


def _remove(path: Path, why: str, dry_run: bool) -> Iterator[Garbage]:
    try:
        garbage = Garbage(path, why, size(path))
    except FileNotFoundError:  # its writer has just ended
        return
    if not dry_run:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    yield garbage


def on_disk(path: AnyPath) -> Path:
    """A store's or set's folder.

    Raises:
        OlaError: it is in an object store, where nothing could keep a late writer from what is being changed.
    """
    if isinstance(path, ObjectPath):
        raise OlaError(
            f"{path}: repair, drop, gc and --retry-failed work on stores on a disk; in an object store, stop every "
            "job, remove the objects of the set (`aws s3 rm --recursive`) and run again"
        )
    return path


def open_stores(config: PipelineConfig) -> list[tuple[TargetStore, AnyPath]]:
    """The stores that the pipeline names and that are there, each with the folder of its corpus.

    Raises:
        OlaError: there is none.
    """
    found = {}
    for data in config.data.values():
        if data.targets is not None and (as_path(data.targets) / "store.json").exists():
            store = TargetStore.open(data.targets, Corpus.open(data.corpus).id)
            found[store.path.resolve()] = store, as_path(data.corpus)
    if not found:
        raise OlaError(f"pipeline {config.name}: no entry of data has a target store yet; `python -m featurize run`")
    return list(found.values())
