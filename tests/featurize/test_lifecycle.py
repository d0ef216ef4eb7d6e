"""Retry, repair, drop, gc and export, as a user has them; what kills do to them on a disk is in test_kill."""

import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from gc import collect
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from featurize.export import export
from featurize.lifecycle import drop, find_sets, gc, withdraw_damaged
from featurize.stage import Job, failed_images, open_jobs, status
from featurize.teachers.base import Teacher
from featurize.verify import verify
from olavlm.config import PipelineConfig
from olavlm.data import codec
from olavlm.data import lease as lease_module
from olavlm.data.amend import TarAmender
from olavlm.data.atomic import replace
from olavlm.data.commit import TarWriter, tar_blocks
from olavlm.data.corpus import Corpus
from olavlm.data.lease import Lease
from olavlm.data.manifest import manifest_file
from olavlm.data.objects import AnyPath, ObjectPath
from olavlm.errors import OlaError

Tree = Callable[[Path], dict[str, bytes | None]]


@dataclass
class Own:
    """A copy of a finished run's store that a test may damage, on a disk or in S3."""

    world: Any
    command: Any
    run: Path
    targets: AnyPath
    form: str

    @property
    def overrides(self) -> list[str]:
        return [f"data.all.targets={self.targets}", f"featurize.format={self.form}"]

    def config(self) -> PipelineConfig:
        return self.world.config(self.run, *self.overrides)

    def job(self) -> Job:
        (job,) = open_jobs(self.config())
        return job

    def files(self) -> dict[str, bytes]:
        if isinstance(self.targets, Path):
            return files_of(self.run)
        return {str(p)[len(str(self.targets)) + 1 :]: p.read_bytes() for p, _ in self.targets.walk()}

    def __call__(self, name: str, *arguments: str) -> int:
        """Run a command, overrides behind its options."""
        return self.command(name, self.run, *arguments, *self.overrides)


def in_s3(path: AnyPath) -> bool:
    return isinstance(path, ObjectPath)


def files_of(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run / "targets")): p.read_bytes() for p in (run / "targets").rglob("*") if p.is_file()}


@pytest.fixture(params=[("zarr", "disk"), ("zarr", "s3"), ("webdataset", "disk"), ("webdataset", "s3")], ids="-".join)
def kind(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Form and place of the stores of a test."""
    return request.param


@pytest.fixture
def whole(kind: tuple[str, str], unbroken: Path, request: pytest.FixtureRequest) -> Path:
    """The finished run in that form, on a disk."""
    return unbroken if kind[0] == "zarr" else request.getfixturevalue("in_tars")[0]


@pytest.fixture
def copied(
    kind: tuple[str, str], world: Any, command: Any, upload: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> Callable[[Path], Own]:
    """Makes a store of such a kind of a finished run's."""

    def copy(run: Path) -> Own:
        form, place = kind
        targets: AnyPath = tmp_path / "run" / "targets"
        if place == "s3":
            targets = request.getfixturevalue("s3") / "targets"
            upload(run / "targets", targets)
        else:
            shutil.copytree(run / "targets", targets)
        return Own(world, command, tmp_path / "run", targets, form)

    return copy


@pytest.fixture
def mine(copied: Any, whole: Path) -> Own:
    """A copy of the finished run."""
    return copied(whole)


MOST = pytest.mark.parametrize(  # where the fourth is no other case
    "kind", [("zarr", "disk"), ("zarr", "s3"), ("webdataset", "disk")], ids="-".join
)


# ---- run --retry-failed


def test_only_failed_images_are_computed_again_and_get_what_they_should_have_had(
    kind: tuple[str, str],
    stumbled: Path,
    whole: Path,
    copied: Any,
    monkeypatch: pytest.MonkeyPatch,
    stored: Any,
    world: Any,
    request: pytest.FixtureRequest,
) -> None:
    mine = copied(stumbled if kind[0] == "zarr" else request.getfixturevalue("in_tars")[1])
    job = mine.job()
    before = mine.files()
    seen: list[str] = []
    preprocess = Teacher.preprocess
    monkeypatch.setattr(
        Teacher, "preprocess", lambda self, image: (seen.append(type(self).__name__), preprocess(self, image))[1]
    )
    assert mine("run", "--retry-failed") == 0
    assert seen == ["UnClip"] * 2  # the truncated images cannot be decoded, the others are only gen's to do
    assert status(job, "gen")["ok"] == 10
    (finished,) = open_jobs(world.config(whole))
    assert stored(mine.job()) == stored(finished)
    after = mine.files()
    assert {name.split("/")[0] for name in after if after[name] != before.get(name)} == {job.sets["gen"].path.name}
    assert list(verify(mine.config())) == []
    assert mine("run", "--retry-failed") == 0  # what still fails is tried, and nothing written
    assert mine.files() == after

    tar = job.corpus.tars[1]
    file = job.sets["gen"].values_file(2)
    replace(file, file.read_bytes()[:100])
    assert mine("repair") == 0  # the tar's second try as well as its first
    assert status(job, "gen")["ok"] == 10
    left = mine.files()
    kept = f"{job.sets['gen'].path.name}/superseded"
    assert not any(name.startswith(f"{kept}/{tar.name}/") for name in left)
    assert list(verify(mine.config())) == []


def test_a_plain_run_leaves_failures_alone(
    world: Any, stumbled: Path, tmp_path: Path, command: Any, tree: Tree
) -> None:
    run = Path(shutil.copytree(stumbled / "targets", tmp_path / "run" / "targets")).parent
    assert command("run", run) == 0
    assert tree(run / "targets") == tree(stumbled / "targets")


# ---- repair


def test_promise_3_once_what_is_damaged_is_computed_again_and_nothing_else(mine: Own, whole: Path, capsys: Any) -> None:
    """Every kind of damage in one store, which ends byte for byte as the undamaged one."""
    job = mine.job()
    first, second = job.corpus.tars
    depth, seg, gen = (job.sets[task] for task in ("depth", "seg", "gen"))
    untouched = depth.commit_file(first).stat().st_mtime

    flipped = bytearray(depth.values_file(2).read_bytes())
    flipped[depth.commit(second).to_pylist()[0]["values_offset"] + 3] ^= 1
    replace(depth.values_file(2), bytes(flipped))
    seg.scales_file(0).unlink()
    replace(seg.values_file(2), seg.values_file(2).read_bytes()[:100])
    replace(gen.commit_file(first), gen.commit_file(first).read_bytes()[:-30])
    commit = gen.commit(second)
    rows = commit.to_pylist()
    rows[0], rows[1] = rows[1], rows[0]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, commit.schema), buffer)
    replace(gen.commit_file(second), buffer.getvalue())
    damaged = {("depth", second.name), ("seg", first.name), ("seg", second.name)}
    damaged |= {("gen", first.name), ("gen", second.name)}
    if mine.form == "zarr":
        replace(depth.path / "values.zarr" / "zarr.json", b"{")
        (seg.path / "scales.zarr" / "zarr.json").unlink()
        damaged |= {("depth", None), ("seg", None)}

    assert {(finding.task, finding.tar and finding.tar.name) for finding in verify(mine.config())} == damaged
    assert mine("repair") == 0
    assert "things that were wrong are repaired" in capsys.readouterr().out
    assert mine.files() == files_of(whole)
    assert depth.commit_file(first).stat().st_mtime == untouched
    assert mine("repair") == 0
    assert "nothing to repair" in capsys.readouterr().out


@pytest.mark.parametrize("where", [-1, -30])
def test_an_index_that_only_zarr_reads_is_checked_too(world: Any, own: Path, where: int) -> None:
    (job,) = open_jobs(world.config(own))
    file = job.sets["depth"].scales_file(1)
    content = bytearray(file.read_bytes())
    content[where] ^= 1
    file.write_bytes(content)
    (finding,) = verify(world.config(own))
    assert finding.what == f"{file}: the index of its chunks is damaged"


@MOST
def test_a_repair_leaves_a_tar_alone_that_another_writer_is_at(mine: Own, capsys: Any) -> None:
    job = mine.job()
    tar = job.corpus.tars[0]
    job.sets["gen"].values_file(0).unlink()
    before = mine.files()
    with Lease.acquire(job.sets["gen"].path / "leases", tar.name):
        assert next(withdraw_damaged(mine.config()))[1] is False
    assert mine.files() == before
    assert next(withdraw_damaged(mine.config()))[1] is True
    assert job.sets["gen"].commit(tar) is None


@pytest.mark.parametrize("kind", [("zarr", "s3")], ids="-".join)
def test_a_damaged_block_that_lost_its_commit_is_never_committed(mine: Own, capsys: Any, whole: Path) -> None:
    """A writer in S3 takes what a dead one left; this it refuses, until it is removed."""
    job = mine.job()
    target, tar = job.sets["depth"], job.corpus.tars[0]
    place = target.commit(tar).to_pylist()[0]["values_offset"]
    target.commit_file(tar).unlink()
    content = bytearray(target.values_file(0).read_bytes())
    content[place + 1] ^= 1
    target.values_file(0).put(bytes(content))
    assert mine("run") == 2
    assert "left here uncommitted, damaged" in capsys.readouterr().err
    assert mine("repair") == 0
    assert mine.files() == files_of(whole)


# ---- drop


@MOST
def test_a_set_is_dropped_by_task_or_by_name_and_only_with_yes(mine: Own, capsys: Any) -> None:
    path = mine.job().sets["seg"].path
    before = mine.files()
    assert mine("drop", "seg") == 0
    assert f"{path}: 2 tars, " in capsys.readouterr().out
    assert mine.files() == before
    with Lease.acquire(path / "leases", "a tar"):
        assert mine("drop", path.name, "--yes") == 2
    assert "a job is at tar a tar" in capsys.readouterr().err
    assert mine.files() == before
    assert mine("drop", path.name, "--yes") == 0
    assert mine.files() == {k: v for k, v in before.items() if not k.startswith(path.name)}
    assert not path.is_dir()
    assert mine("drop", "seg", "--yes") == 2
    assert "no target set 'seg'; there are: depth-" in capsys.readouterr().err


def test_of_several_sets_of_a_task_one_has_to_be_named(world: Any, own: Path, command: Any, capsys: Any) -> None:
    (job,) = open_jobs(world.config(own))
    path = job.sets["seg"].path
    other = path.with_name("seg-000000000000")
    shutil.copytree(path, other)
    assert command("drop", own, "seg", "--yes") == 2
    assert f"2 sets of 'seg', name one of them: {other.name}, {path.name}" in capsys.readouterr().err
    assert command("drop", own, other.name, "--yes") == 0
    assert path.exists()
    assert not other.exists()


# ---- gc


@MOST
def test_gc_removes_what_no_commit_lists_and_nothing_else(mine: Own, whole: Path, capsys: Any) -> None:
    job = mine.job()
    depth = job.sets["depth"]
    before = mine.files()
    first, second = job.corpus.tars
    block = depth.values_file(0)
    half = [depth.path / "leases" / ".x.1.1-ab.tmp"]
    if not in_s3(mine.targets):
        half += [mine.targets / ".store.json.1-ab.tmp", depth.path / ".target.json.1-ab.tmp"]
        half += [depth.path / "commits" / f".{first.name}.parquet.1-ab.tmp", block.with_name(f".{block.name}.1-ab.tmp")]
        half += [depth.path / "values.zarr" / ".zarr.json.1-ab.tmp"] * (mine.form == "zarr")
        shutil.copytree(job.sets["gen"].path, mine.targets / ".gen-0123456789ab.1-ab.tmp")
    kept = depth.superseded_file(second, "0" * 32)
    for file in (*half, depth.values_file(99), kept):
        replace(file, b"half, or of no commit")
    with subprocess.Popen(["true"]) as dead:
        pass
    replace(depth.path / "leases" / "x.1", f"{lease_module._host()} {dead.pid} 0".encode())
    depth.commit_file(second).unlink()

    littered = mine.files()
    assert mine("gc", "--dry-run") == 0
    would = capsys.readouterr().out
    assert "would be removed" in would
    assert mine.files() == littered
    assert mine("gc") == 0
    assert capsys.readouterr().out == would.replace("would be removed", "were removed")
    left = mine.files()
    lost = {
        str(file)[len(str(mine.targets)) + 1 :] for b in (2, 3) for file in (depth.values_file(b), depth.scales_file(b))
    }
    lost.add(str(depth.commit_file(second))[len(str(mine.targets)) + 1 :])
    assert left == {name: data for name, data in before.items() if name not in lost}
    assert mine("gc") == 0
    assert "0 B in 0 places were removed" in capsys.readouterr().out
    assert mine("run") == 0
    assert mine.files() == files_of(whole)


def test_gc_by_an_older_copy_of_a_grown_corpus_removes_nothing(mine: Own, capsys: Any) -> None:
    """To it the blocks of newer tars are no tar's."""
    depth = mine.job().sets["depth"]
    replace(depth.path / "commits" / "newer.parquet", b"as of a newer tar")
    replace(depth.values_file(99), b"and its block")
    before = mine.files()
    assert mine("gc") == 2
    assert "has commits of 1 tars that corpus" in (told := " ".join(capsys.readouterr().err.split()))
    assert "does not have, newer for one; is that an older copy of the corpus?" in told
    assert mine.files() == before


@MOST
def test_gc_leaves_a_living_writer_alone(mine: Own) -> None:
    # Two blocks, in two arrays or one tar each; on a disk the half commit, and the half block that no folder goes with.
    expected = {"zarr": 4, "webdataset": 2}[mine.form] + {"zarr": 1, "webdataset": 2}[mine.form] * (
        not in_s3(mine.targets)
    )
    job = mine.job()
    depth, tar = job.sets["depth"], job.corpus.tars[0]
    depth.commit_file(tar).unlink()
    half = [] if in_s3(mine.targets) else [depth.values_file(0).with_name(f".{depth.values_file(0).name}.1-ab.tmp")]
    half += [] if in_s3(mine.targets) else [depth.path / "commits" / f".{tar.name}.parquet.1-ab.tmp"]
    with TarWriter.open(depth, tar, tar_blocks(job.corpus.tars, depth.block)[tar.name]):
        for file in half:
            file.write_bytes(b"half")
        before = mine.files()
        assert list(gc(mine.config())) == []
        assert mine.files() == before
    assert len(list(gc(mine.config()))) == expected


# ---- killed in an object store, at any of its changes (on a disk: test_kill)


class Killed(BaseException):
    """What a killed process is here: nothing it does from then on reaches the store."""


@contextmanager
def killed_at(number: int) -> Iterator[list[str]]:
    """Dies before its change of the store of that number; yields the names of the changes, which grow."""
    changes: list[str] = []

    def dying(name: str) -> Any:
        real = getattr(ObjectPath, name)

        def change(path: ObjectPath, *arguments: Any, **more: Any) -> Any:
            if not path.name.endswith(".tmp"):
                changes.append(name)
            if len(changes) >= number:
                raise Killed(name)
            return real(path, *arguments, **more)

        return change

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("olavlm.data.lease._BEAT", 1e6)  # the heart of a dead process does not beat
        for name in ("_put", "update", "unlink", "rmtree"):
            patch.setattr(ObjectPath, name, dying(name))
        with suppress(Killed):
            yield changes


@pytest.mark.parametrize("kind", [("zarr", "s3")], ids="-".join)
def test_promise_3_once_a_drop_killed_anywhere_in_s3_is_ended_by_gc(
    mine: Own, whole: Path, upload: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seg = mine.job().sets["seg"].path
    rest = {name: data for name, data in files_of(whole).items() if not name.startswith(seg.name)}
    for number in range(2, 99):
        with killed_at(number) as changes:
            for target in find_sets(mine.config(), "seg"):
                drop(target)
        if len(changes) < number:
            break
        with monkeypatch.context() as patch:
            patch.setattr("olavlm.data.lease._stale", lambda path: True)
            assert mine("run") == 2  # nobody begins the set anew meanwhile
            assert (
                f"{seg}: being dropped; if that was killed, `python -m featurize gc` ends it" in capsys.readouterr().err
            )
            assert [g.path for g in gc(mine.config(), dry_run=True)] == [seg]
            assert [g.path for g in gc(mine.config())] == [seg]
        assert mine.files() == rest
        upload(whole / "targets", mine.targets)
    assert number > 5
    assert mine.files() == rest


@pytest.mark.parametrize("kind", [("webdataset", "s3")], ids="-".join)
def test_promise_3_once_a_repair_killed_anywhere_in_s3_goes_on(
    mine: Own, whole: Path, upload: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = mine.job()
    target, tar = job.sets["depth"], job.corpus.tars[0]
    ends = []
    for number in range(2, 99):
        upload(whole / "targets", mine.targets)
        replace(target.values_file(0), b"")
        with killed_at(number) as changes:
            list(withdraw_damaged(mine.config()))
        monkeypatch.setattr("olavlm.data.lease._stale", lambda path: True)
        if target.commit_file(tar).exists():  # else a run may come: nothing damaged may be left for it to take
            list(withdraw_damaged(mine.config()))
        ends.append(mine.files())
        list(gc(mine.config()))
        monkeypatch.undo()
        if len(changes) < number:
            break
    assert number > 4
    assert all({name for name in end if "/leases/" not in name} == set(ends[-1]) for end in ends)
    assert mine("run") == 0
    assert mine.files() == files_of(whole)


# ---- compact, export and the rest of the command line


def test_status_is_the_same_before_and_after_compacting(
    world: Any, own: Path, command: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("status", own) == 0
    before = capsys.readouterr().out
    assert command("compact", own) == 0
    assert ": 2 commits, " in capsys.readouterr().out
    monkeypatch.setattr("olavlm.data.manifest._open", lambda target, name: pytest.fail("no commit need be opened"))
    assert command("status", own) == 0
    assert capsys.readouterr().out == before
    (job,) = open_jobs(world.config(own))
    assert manifest_file(job.sets["gen"]).exists()
    assert len(list(failed_images(job))) == 6


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_export_is_read_without_this_package(world: Any, own: Path, tmp_path: Path, command: Any) -> None:
    wds = pytest.importorskip("webdataset")
    assert command("export", own, "--out", str(tmp_path / "out")) == 0
    (job,) = open_jobs(world.config(own))
    tar = job.corpus.tars[0]
    urls = [str(tmp_path / "out" / f"{tar.name}.tar") for tar in job.corpus.tars]
    samples = {s["__key__"]: s for s in wds.WebDataset(urls, shardshuffle=False)}
    collect()  # webdataset leaves its files open; this is the test that may say so
    assert list(samples) == list(
        dict.fromkeys(e["key"] for t in job.corpus.tars for e in job.corpus.index(t).to_pylist())
    )
    assert {k for k in samples["t0s0"] if k[:2] != "__"} == {"png", "json", "depth.npy", "seg.npy", "gen.npy"}
    assert {k for k in samples["t0s1"] if k.endswith("npy") or k.endswith("png")} == {
        f"{i}.{what}" for i in (0, 1) for what in ("png", "depth.npy", "seg.npy", "gen.npy")
    }
    assert {k for k in samples["t0s2"] if k[:2] != "__"} == {"png", "json"}  # its image has no target
    assert {k for k in samples["t0s3"] if k[:2] != "__"} == {"json"}
    for entry, row in zip(job.corpus.index(tar).to_pylist(), job.sets["depth"].commit(tar).to_pylist(), strict=True):
        if row["status"] == "ok" and entry["key"] != "t0s1":
            sample = samples[entry["key"]]
            assert sample["png"] == job.corpus.read(tar, entry["image_offset"], entry["image_bytes"])
            assert json.loads(sample["json"])["conversations"]
            features = np.load(io.BytesIO(sample["depth.npy"]))
            assert features.dtype == np.float16
            values, scales = job.sets["depth"].read(row, row["key"])
            expected = codec.decode(torch.tensor(values), torch.tensor(scales), "int8").numpy()
            np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-6)


def test_an_export_goes_on_where_it_was_and_is_of_one_thing(
    world: Any, own: Path, tmp_path: Path, command: Any, capsys: Any, tree: Tree
) -> None:
    out = tmp_path / "out"
    (job,) = open_jobs(world.config(own))
    commit = job.sets["gen"].commit_file(job.corpus.tars[1])
    content = commit.read_bytes()
    commit.unlink()
    assert command("export", own, "--out", str(out)) == 1
    assert f"tar {job.corpus.tars[1].name}: not featurized by gen" in capsys.readouterr().out
    commit.write_bytes(content)
    (out / f".{job.corpus.tars[1].name}.tar.1-ab.tmp").write_bytes(b"half")
    stamp = (out / f"{job.corpus.tars[0].name}.tar").stat().st_mtime_ns
    assert command("export", own, "--out", str(out)) == 0
    assert (out / f"{job.corpus.tars[0].name}.tar").stat().st_mtime_ns == stamp
    assert command("export", own, "--out", str(tmp_path / "again")) == 0
    assert tree(out) == tree(tmp_path / "again")
    (out / "export.json").write_text('{"corpus": "another"}')
    with pytest.raises(OlaError, match=r"an export of \{'corpus': 'another'\}, not of"):
        list(export(world.config(own), "all", out))


def test_promise_1_key_checked_no_target_is_exported_beside_another_image(
    world: Any, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Corpus.read

    def flipped(self: Corpus, tar: Any, offset: int, nbytes: int) -> bytes:
        data = bytearray(read(self, tar, offset, nbytes))
        data[-1] ^= 1
        return bytes(data)

    monkeypatch.setattr(Corpus, "read", flipped)
    with pytest.raises(OlaError, match=r"0\.tar: sample 't0s0', image 0: its bytes are not those that were indexed"):
        list(export(world.config(own), "all", tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*0.tar"))


def test_an_export_is_made_anew_of_what_a_retry_changed(
    world: Any, stumbled: Path, tmp_path: Path, command: Any, tree: Tree
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(stumbled / "targets", run / "targets")
    (job,) = open_jobs(world.config(run))
    tar = job.corpus.tars[1]
    assert command("export", run, "--out", str(out)) == 0
    before, stamps = tree(out), {file: file.stat() for file in out.iterdir()}
    with TarAmender.open(job.sets["gen"], tar, tar_blocks(job.corpus.tars, 4)[tar.name]) as amender:
        for entry, row in zip(job.corpus.index(tar).to_pylist(), job.sets["gen"].commit(tar).to_pylist(), strict=True):
            if row["status"] == "failed" and "truncated" not in row["reason"]:
                values = np.zeros(job.sets["gen"].identity.layout.shape, np.float16)
                amender.add(row["key"], row["image_index"], entry["image_hash"], values, None, 1.0, 2.0)
        amender.commit()
    assert command("export", run, "--out", str(out)) == 0
    assert {name for name, data in tree(out).items() if data != before[name]} == {f"{tar.name}.tar"}
    assert {file.name for file in out.iterdir() if file.stat() != stamps[file]} == {f"{tar.name}.tar"}
    with tarfile.open(out / f"{tar.name}.tar") as file:
        assert sum(name.endswith(".gen.npy") for name in file.getnames()) == status(job, "gen")["ok"] - sum(
            row["status"] == "ok" for row in job.sets["gen"].commit(job.corpus.tars[0]).to_pylist()
        )


@pytest.mark.parametrize("name", ["run", "status", "verify", "repair", "drop", "gc", "compact", "export", "inspect"])
def test_every_command_has_help_and_one_line_for_a_store_that_is_not_there(
    name: str, command: Any, tmp_path: Path, capsys: Any
) -> None:
    with pytest.raises(SystemExit) as ended:
        command(name, tmp_path, "--help")
    assert ended.value.code == 0
    assert f"usage: python -m featurize {name}" in capsys.readouterr().out
    arguments = {"drop": ["depth"], "export": ["--out", str(tmp_path / "out")]}.get(name, [])
    if name != "run":
        assert command(name, tmp_path / "nothing", *arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_member_is_dated_by_nobody(world: Any, own: Path, tmp_path: Path) -> None:
    list(export(world.config(own), "all", tmp_path / "out"))
    with tarfile.open(next((tmp_path / "out").glob("*.tar"))) as file:
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in file.getmembers()} == {(0, 0, 0, "")}
