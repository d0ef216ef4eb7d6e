"""Retry, repair, drop, gc and export, as a user has them; what kills do to them is in test_kill."""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from gc import collect
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from featurize.export import export
from featurize.lifecycle import gc
from featurize.stage import failed_images, open_jobs, status
from featurize.teachers.base import Teacher
from featurize.verify import verify
from olavlm.data import codec
from olavlm.data.commit import TarWriter
from olavlm.data.lease import Lease
from olavlm.data.manifest import manifest_file
from olavlm.errors import OlaError

Tree = Callable[[Path], dict[str, bytes | None]]


# ---- run --retry-failed


def test_only_failed_images_are_computed_again_and_get_what_they_should_have_had(
    world: Any,
    stumbled: Path,
    unbroken: Path,
    tmp_path: Path,
    command: Any,
    monkeypatch: pytest.MonkeyPatch,
    tree: Tree,
    stored: Any,
) -> None:
    run = Path(shutil.copytree(stumbled / "targets", tmp_path / "run" / "targets")).parent
    (job,) = open_jobs(world.config(run))
    kept = {p: p.stat().st_mtime_ns for task in ("depth", "seg") for p in job.sets[task].path.rglob("*") if p.is_file()}
    seen: list[str] = []
    preprocess = Teacher.preprocess
    monkeypatch.setattr(
        Teacher, "preprocess", lambda self, image: (seen.append(type(self).__name__), preprocess(self, image))[1]
    )
    assert command("run", run, "--retry-failed") == 0
    assert seen == ["UnClip"] * 2  # the truncated images cannot be decoded, the others are only gen's to do
    assert status(job, "gen")["ok"] == 10
    (job,) = open_jobs(world.config(run))
    (whole,) = open_jobs(world.config(unbroken))
    assert stored(job) == stored(whole)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert list(verify(world.config(run))) == []
    before = tree(run / "targets")
    assert command("run", run, "--retry-failed") == 0  # what still fails is tried, and nothing written
    assert tree(run / "targets") == before


def test_a_plain_run_leaves_failures_alone(
    world: Any, stumbled: Path, tmp_path: Path, command: Any, tree: Tree
) -> None:
    run = Path(shutil.copytree(stumbled / "targets", tmp_path / "run" / "targets")).parent
    assert command("run", run) == 0
    assert tree(run / "targets") == tree(stumbled / "targets")


# ---- repair


def test_promise_3_once_what_is_damaged_is_computed_again_and_nothing_else(
    world: Any, own: Path, unbroken: Path, command: Any, tree: Tree, capsys: Any
) -> None:
    """Every kind of damage in one store, which ends byte for byte as the undamaged one."""
    (job,) = open_jobs(world.config(own))
    first, second = job.corpus.tars
    depth, seg, gen = (job.sets[task] for task in ("depth", "seg", "gen"))
    untouched = depth.commit_file(first).stat()

    flipped = bytearray(depth.values_file(2).read_bytes())
    flipped[depth.commit(second).to_pylist()[0]["values_offset"] + 3] ^= 1
    depth.values_file(2).write_bytes(flipped)
    seg.scales_file(0).unlink()
    os.truncate(seg.values_file(2), 100)
    gen.commit_file(first).write_bytes(gen.commit_file(first).read_bytes()[:-30])
    commit = gen.commit(second)
    rows = commit.to_pylist()
    rows[0], rows[1] = rows[1], rows[0]
    pq.write_table(pa.Table.from_pylist(rows, commit.schema), gen.commit_file(second))
    (depth.path / "values.zarr" / "zarr.json").write_text("{")
    (seg.path / "scales.zarr" / "zarr.json").unlink()

    found = {(finding.task, finding.tar and finding.tar.name) for finding in verify(world.config(own))}
    assert found == {
        ("depth", second.name),
        ("depth", None),
        ("seg", first.name),
        ("seg", second.name),
        ("seg", None),
        ("gen", first.name),
        ("gen", second.name),
    }
    assert command("repair", own) == 0
    assert "things that were wrong are repaired" in capsys.readouterr().out
    assert tree(own / "targets") == tree(unbroken / "targets")
    assert depth.commit_file(first).stat().st_ino == untouched.st_ino
    assert command("repair", own) == 0
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


def test_a_repair_leaves_a_tar_alone_that_another_writer_is_at(
    world: Any, own: Path, command: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job,) = open_jobs(world.config(own))
    tar = job.corpus.tars[0]
    job.sets["gen"].values_file(0).unlink()
    before = job.sets["gen"].commit_file(tar).read_bytes()
    with Lease.acquire(job.sets["gen"].path / "leases", tar.name):
        assert command("repair", own) == 1
    assert "another writer is at it, left alone" in capsys.readouterr().out
    assert job.sets["gen"].commit_file(tar).read_bytes() == before
    assert command("repair", own) == 0


# ---- drop


def test_a_set_is_dropped_by_task_or_by_name_and_only_with_yes(
    world: Any, own: Path, command: Any, capsys: Any, tree: Tree
) -> None:
    (job,) = open_jobs(world.config(own))
    path = job.sets["seg"].path
    before = tree(own / "targets")
    assert command("drop", own, "seg") == 0
    assert f"{path}: 2 tars, " in capsys.readouterr().out
    assert tree(own / "targets") == before
    with Lease.acquire(path / "leases", "a tar"):
        assert command("drop", own, path.name, "--yes") == 2
    assert "a job is at tar a tar" in capsys.readouterr().err
    assert command("drop", own, path.name, "--yes") == 0
    assert tree(own / "targets") == {k: v for k, v in before.items() if not k.startswith(path.name)}
    assert command("drop", own, "seg", "--yes") == 2
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


def test_gc_removes_what_no_commit_lists_and_nothing_else(
    world: Any, own: Path, unbroken: Path, command: Any, tree: Tree, capsys: Any
) -> None:
    (job,) = open_jobs(world.config(own))
    depth = job.sets["depth"]
    whole = tree(own / "targets")
    block = depth.values_file(0).parent
    for folder, name in (
        (own / "targets", ".store.json.1-ab.tmp"),
        (depth.path, ".target.json.1-ab.tmp"),
        (depth.path / "commits", f".{job.corpus.tars[0].name}.parquet.1-ab.tmp"),
        (depth.path / "values.zarr", ".zarr.json.1-ab.tmp"),
        (depth.path / "leases", ".x.1.1-ab.tmp"),
        (block, ".0.1-ab.tmp"),
    ):
        (folder / name).write_bytes(b"half")
    dropped = own / "targets" / ".gen-0123456789ab.1-ab.tmp"
    shutil.copytree(job.sets["gen"].path, dropped)
    (depth.path / "values.zarr" / "c" / "99" / "0").mkdir(parents=True)
    (depth.path / "leases" / "x.1").write_text("elsewhere 1 0")
    os.utime(depth.path / "leases" / "x.1", (0, 0))
    kept = depth.superseded_file(job.corpus.tars[1], "0" * 32)
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"of a commit that is gone")
    depth.commit_file(job.corpus.tars[1]).unlink()

    littered = tree(own / "targets")
    assert command("gc", own, "--dry-run") == 0
    would = capsys.readouterr().out
    assert "would be removed" in would
    assert tree(own / "targets") == littered
    assert command("gc", own) == 0
    assert capsys.readouterr().out == would.replace("would be removed", "were removed")
    left = tree(own / "targets")
    gone = {path for path in whole if path not in left}
    assert all(whole[path] == left[path] for path in whole.keys() & left.keys())
    blocks = {int(Path(path).parts[3]) for path in gone if "/c/" in path}
    assert blocks == {2, 3}  # those of the second tar, whose commit was lost
    assert left.keys() - whole.keys() <= {str(kept.parent.parent.relative_to(own / "targets"))}
    assert command("gc", own) == 0
    assert "0 B in 0 places were removed" in capsys.readouterr().out
    assert command("run", own) == 0
    shutil.rmtree(kept.parent.parent)
    assert tree(own / "targets") == tree(unbroken / "targets")


def test_gc_leaves_a_living_writer_alone(world: Any, own: Path) -> None:
    (job,) = open_jobs(world.config(own))
    depth, tar = job.sets["depth"], job.corpus.tars[0]
    depth.commit_file(tar).unlink()
    (depth.path / "commits" / f".{tar.name}.parquet.1-ab.tmp").write_bytes(b"half")
    with TarWriter.open(depth, tar, 0):
        half = depth.values_file(0).with_name(".0.1-ab.tmp")
        half.write_bytes(b"half")
        assert list(gc(world.config(own))) == []
        assert half.exists()
        assert depth.values_file(0).exists()
    assert len(list(gc(world.config(own)))) == 4  # two blocks of values and of scales


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
