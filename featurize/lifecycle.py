"""Looking after stores: repair what is damaged, drop a set, collect what no commit lists, compact the commits.

All of it may run beside jobs and readers and be killed at any moment: whatever a writer may be at is done under its
tar's lease, and the same command run again goes on.

On a disk leases fence, so a writer that wakes up after a takeover changes nothing. In an object store one that was
paused between its last look at the lease and its write may still do that one write, of a block or of the commit, after
what is there was withdrawn, collected or dropped. A block then is as good as any writer's. A commit may list blocks
that are gone, or that another writer has computed anew: reading them says missing, cut short or damaged, as long as
they are not the very same bytes, and `verify` and `repair` find them. No target becomes another one.
"""

import os
import secrets
import shutil
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace

from featurize.progress import track
from featurize.stage import Job, open_jobs
from featurize.verify import Finding, verify, verify_tar
from olavlm.config import PipelineConfig
from olavlm.data.atomic import written_as
from olavlm.data.commit import block_files, take, tar_blocks
from olavlm.data.corpus import Corpus, Tar
from olavlm.data.lease import Lease, LeaseLost, leased
from olavlm.data.objects import AnyPath, ObjectPath, as_path
from olavlm.data.targets import DROPPED, TargetSet, TargetStore
from olavlm.errors import OlaError

_DEAD, _UNLISTED = "left by a dead writer", "no commit lists it"


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
    numbers = {
        (job.name, task): tar_blocks(job.corpus.tars, of.block)
        for job in jobs.values()
        for task, of in job.sets.items()
    }
    withdrawn: dict[tuple[str, str, Tar], bool] = {}
    for finding in verify(config, recompute):
        if finding.tar is None:
            yield finding, True
            continue
        place = finding.data, finding.task, finding.tar
        if place not in withdrawn:
            withdrawn[place] = _withdraw(
                jobs[finding.data], finding, numbers[finding.data, finding.task][finding.tar.name]
            )
        yield finding, withdrawn[place]


def _withdraw(job: Job, finding: Finding, blocks: range) -> bool:
    """Remove a tar's commit, and the ones it superseded; unless another repair has made it good meanwhile."""
    task, tar = finding.task, finding.tar
    assert tar is not None
    target = TargetSet(job.sets[task].path)  # one that has no file open
    lease = take(target, tar.name, blocks)
    if lease is None:
        return False
    with lease, suppress(LeaseLost):
        if finding.recomputed or any(verify_tar(replace(job, sets={task: target}), task, tar)):
            lease.check()  # that took long
            if isinstance(target.path, ObjectPath):
                # A run takes the blocks that it finds here, so they go before the commit, until which the tar is
                # committed to a run. (On a disk it replaces them.)
                for file in block_files(target, blocks):
                    file.unlink(missing_ok=True)
            _remove(target.path / "superseded" / tar.name)
            target.commit_file(tar).unlink(missing_ok=True)
        return True
    return False


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

    In an object store, which cannot rename, the lease in ``dropped/`` says until the end that it goes: no job can begin
    the set anew while its objects are being removed.

    Raises:
        OlaError: somebody is writing to it, or dropping it.
    """
    folder = target.path
    if isinstance(folder, ObjectPath):
        lease = Lease.acquire(folder.parent / DROPPED, folder.name)
        if lease is None:
            raise OlaError(f"{folder}: somebody else is dropping it")
        try:
            _refuse_if_written(folder)
        except BaseException:
            lease.release()
            raise
        _empty(folder, lease)
        return
    _refuse_if_written(folder)
    gone = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    os.rename(folder, gone)
    _remove(gone)


def _refuse_if_written(folder: AnyPath) -> None:
    busy = [name for name in leased(folder / "leases") if Lease.held(folder / "leases", name)]
    if busy:
        raise OlaError(
            f"{folder}: a job is at tar {busy[0]}{' and others' * (len(busy) > 1)}; stop it, or wait a minute if "
            "it was killed on another machine"
        )


def _empty(folder: ObjectPath, lease: Lease) -> None:
    """Remove a set's objects, first what makes it one; nothing more once somebody else has taken over.

    Raises:
        OlaError: somebody else has taken over.
    """
    try:
        lease.check()
        (folder / "target.json").unlink(missing_ok=True)
        (folder / "commits").rmtree(lease.check)
        folder.rmtree(lease.check)
    except LeaseLost as error:
        raise OlaError(f"{folder}: {error}") from None
    lease.release()


def size(path: AnyPath) -> int:
    """Bytes of a file or object, or of all in a folder or below a prefix."""
    if isinstance(path, ObjectPath):
        return sum(stat.st_size for _, stat in path.walk()) if path.is_dir() else path.stat().st_size
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


# ---- gc


@dataclass(frozen=True)
class Garbage:
    """A file, folder, object or prefix that no commit lists."""

    path: AnyPath
    why: str
    bytes: int


def gc(config: PipelineConfig, dry_run: bool = False) -> Iterator[Garbage]:
    """Remove from every store of the pipeline, whatever the set, what no commit lists and no living writer is at.

    Yields:
        What is removed, or would be.
    """
    for store, corpus in open_stores(config):
        for path in _entries(store.path):
            if written_as(path.name):
                yield from _collected(path, "left by a killed drop" if path.is_dir() else _DEAD, dry_run)
        for name in leased(store.path / DROPPED):
            yield from _end_drop(store.path, name, dry_run)
        for target in store.targets():
            yield from _collect(target, corpus, dry_run)


def _end_drop(store: AnyPath, name: str, dry_run: bool) -> Iterator[Garbage]:
    """What a killed drop has left of a set in an object store."""
    folder, dropped = store / name, store / DROPPED
    if not isinstance(folder, ObjectPath) or Lease.held(dropped, name):
        return
    garbage = Garbage(folder, "left by a killed drop", sum(stat.st_size for _, stat in folder.walk()))
    if not dry_run:
        lease = Lease.acquire(dropped, name)
        if lease is None:
            return  # somebody has just come
        _empty(folder, lease)
    yield garbage


def _collect(target: TargetSet, corpus: AnyPath, dry_run: bool) -> Iterator[Garbage]:
    leases = target.path / "leases"
    taken = [path for path in _entries(leases) if not written_as(path.name)]
    loose, of_tar, numbers = _candidates(target, corpus)
    for path, why in loose:
        yield from _collected(path, why, dry_run)
    for path in taken:
        of_tar.setdefault(path.name.rpartition(".")[0], []).append((path, "lease of a dead writer"))
    for name in track(sorted(of_tar), f"{target.path.name}: gc"):
        if Lease.held(leases, name):
            continue
        found = [garbage for path, why in of_tar[name] if (garbage := _garbage(path, why))]
        lease = None if dry_run else take(target, name, numbers.get(name, range(0)))  # which removes some of it
        if lease is None and not dry_run:
            continue  # somebody has just come
        with lease or nullcontext(), suppress(LeaseLost):
            committed = (target.path / "commits" / f"{name}.parquet").exists()
            for garbage in found:
                if not (garbage.why == _UNLISTED and committed):
                    if lease:
                        lease.check()
                        _remove(garbage.path)
                    yield garbage


Candidates = list[tuple[AnyPath, str]]  # what may go, and why


def _candidates(target: TargetSet, corpus: AnyPath) -> tuple[Candidates, dict[str, Candidates], dict[str, range]]:
    """What may be removed of a set at once, what by tar, whose lease it takes to be sure, and the tars' blocks."""
    folder = target.path
    arrays = [path for path in _entries(folder) if path.name.endswith(".zarr")]
    shards = [folder / "tars"] if target.format == "webdataset" else [array / "c" for array in arrays]
    found_blocks = [path for place in shards for path in _entries(place)]
    committed = {file.stem for file in (folder / "commits").glob("[!.]*.parquet")}
    # The corpus after blocks and leases, so that it knows the tars of all of them.
    numbers = tar_blocks(Corpus.open(corpus).tars, target.block)
    if unknown := committed - numbers.keys():
        raise OlaError(
            f"{folder}: has commits of {len(unknown)} tars that corpus {corpus} does not have, {min(unknown)} for one; "
            "is that an older copy of the corpus? Nothing of this set was removed"
        )
    owners = [(blocks, name) for name, blocks in numbers.items() if blocks]
    loose: Candidates = []
    of_tar: dict[str, Candidates] = {}
    for place in (folder, folder / "leases", *arrays):
        loose += [(path, _DEAD) for path in _entries(place) if written_as(path.name)]
    for path in _entries(folder / "commits"):
        if commit := written_as(path.name):
            of_tar.setdefault(commit.removesuffix(".parquet"), []).append((path, _DEAD))
    for kept in _entries(folder / "superseded"):
        found = [(path, _DEAD) for path in _entries(kept) if written_as(path.name)]
        of_tar.setdefault(kept.name, []).extend(found if kept.name in committed else [(kept, _UNLISTED)])
    for path in found_blocks:
        temporary = written_as(path.name)
        number = (temporary or path.name).removesuffix(".tar")
        if not number.isdigit():
            continue  # nothing of ours
        if not owners or int(number) not in range(owners[-1][0].stop):
            loose.append((path, "block of no tar"))
            continue
        _, name = owners[bisect_right(owners, int(number), key=lambda owner: owner[0].start) - 1]
        found = [(path, _DEAD)] if temporary else [(path, _UNLISTED)] if name not in committed else _left_in(path)
        of_tar.setdefault(name, []).extend(found)
    return loose, {name: found for name, found in of_tar.items() if found}, numbers


def _left_in(block: AnyPath) -> Candidates:
    """What dead writers left in the folder of a block; an object store has neither."""
    if isinstance(block, ObjectPath):
        return []
    return [(left, _DEAD) for left in sorted(block.rglob(".*")) if written_as(left.name)]


def _entries(place: AnyPath) -> list[AnyPath]:
    """What lies right in a folder or below a prefix, by name; nothing where there is none."""
    with suppress(FileNotFoundError):
        return sorted(place.iterdir(), key=lambda path: path.name)
    return []


def _garbage(path: AnyPath, why: str) -> Garbage | None:
    """What lies there; None where it has just gone."""
    try:
        return Garbage(path, why, size(path)) if path.is_dir() or path.exists() else None
    except FileNotFoundError:  # its writer has just ended
        return None


def _collected(path: AnyPath, why: str, dry_run: bool) -> Iterator[Garbage]:
    if garbage := _garbage(path, why):
        if not dry_run:
            _remove(path)
        yield garbage


def _remove(path: AnyPath) -> None:
    """Remove a file or object, or a folder or prefix with all in it, if it is there."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
    elif isinstance(path, ObjectPath):
        path.rmtree()
    else:
        shutil.rmtree(path, ignore_errors=True)


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
