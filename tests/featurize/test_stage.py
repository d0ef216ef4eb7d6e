import errno
import io
import json
import os
import shutil
import sys
import tarfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from featurize import stage, teachers
from featurize.corpus.adopt import adopt
from featurize.job import InProcess
from featurize.stage import failed_images, open_jobs, run_pipeline, status
from featurize.teachers.unclip import UnClip
from featurize.worker import Unit, Worker
from olavlm.data import codec
from olavlm.data.commit import TarWriter, tar_blocks
from olavlm.data.images import decode_image
from olavlm.errors import OlaError

Tree = Callable[[Path], dict[str, bytes | None]]


@pytest.fixture
def own(unbroken: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(unbroken / "targets", tmp_path / "run" / "targets")).parent


# ---- what is stored


def test_stored_targets_are_what_the_teachers_compute(world: Any, unbroken: Path) -> None:
    config = world.config(unbroken)
    (job,) = open_jobs(config)
    for task, stated in config.teachers.items():
        teacher = teachers.load(stated)
        checked = 0
        for tar in job.corpus.tars:
            index = job.corpus.index(tar).to_pylist()
            for entry, row in zip(index, job.sets[task].commit(tar).to_pylist(), strict=True):
                if row["status"] != "ok":
                    continue
                image = decode_image(job.corpus.read(tar, entry["image_offset"], entry["image_bytes"]))
                expected = teacher.encode(teacher.preprocess(image)[None])[0]
                values, scales = job.sets[task].read(row, entry["key"])
                got = codec.decode(torch.tensor(values), None if scales is None else torch.tensor(scales), stated.codec)
                step = expected.abs().amax(-1, keepdim=True) / 127
                assert ((got - expected).abs() <= 0.51 * step + 1e-4).all()
                assert row["absmax"] == pytest.approx(float(expected.abs().max()), rel=1e-3)
                assert row["rms"] == pytest.approx(float(expected.square().mean().sqrt()), rel=1e-3)
                checked += 1
        assert checked == 10


def test_commits_mirror_the_corpus_index(world: Any, unbroken: Path) -> None:
    (job,) = open_jobs(world.config(unbroken))
    for target in job.sets.values():
        for tar in job.corpus.tars:
            index, commit = job.corpus.index(tar).to_pylist(), target.commit(tar).to_pylist()
            for name in ("key", "image_index", "image_hash"):
                assert [row[name] for row in commit] == [row[name] for row in index]
            assert [row["status"] == "no_image" for row in commit] == [row["image_index"] < 0 for row in index]


def test_promise_8_nothing_lost_every_bad_image_is_counted_and_named(world: Any, unbroken: Path) -> None:
    summary = json.loads((unbroken / "featurize" / "summary.json").read_text())
    assert (summary["images"], summary["failed"], summary["computed_images"]) == (12, 2, 12)
    assert summary["bytes_per_image"] == {"depth": 36 * 16 + 36 * 4, "seg": 36 * 64 + 36 * 4, "gen": 48}
    assert summary["bytes"] == 10 * (36 * 16 + 36 * 4 + 36 * 64 + 36 * 4 + 48)
    failed = [json.loads(line) for line in (unbroken / "featurize" / "failed.jsonl").read_text().splitlines()]
    assert {(f["task"], f["key"]) for f in failed} == {
        (task, key) for task in ("depth", "seg", "gen") for key in ("t0s2", "t1s2")
    }
    assert len(failed) == 6
    assert all("truncated" in f["reason"] for f in failed)
    (job,) = open_jobs(world.config(unbroken))
    assert status(job, "depth") == {"tars": 2, "committed": 2, "ok": 10, "failed": 2, "missing": 0, "bytes": 10 * 720}
    assert list(failed_images(job)) == failed


def test_features_that_are_not_finite_fail_their_image_only(world: Any, stumbled: Path) -> None:
    (job,) = open_jobs(world.config(stumbled))
    reasons = [(f["task"], f["reason"]) for f in failed_images(job) if "truncated" not in f["reason"]]
    assert reasons == [("gen", "features are not finite")] * 2  # the second of every batch, where it is not padding
    assert status(job, "gen")["ok"] == 8
    assert status(job, "depth")["ok"] == 10


def test_an_image_that_one_teacher_cannot_take_costs_that_teachers_target_only(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess = UnClip.preprocess

    def picky(self: UnClip, image: Any) -> torch.Tensor:
        if image.height > 45:
            raise ValueError("too high")
        return preprocess(self, image)

    monkeypatch.setattr(UnClip, "preprocess", picky)
    run_pipeline(world.config(tmp_path))
    (job,) = open_jobs(world.config(tmp_path))
    failed = [(f["task"], f["key"], f["image_index"]) for f in failed_images(job) if f["reason"] == "too high"]
    assert failed == [("gen", "t0s1", 1), ("gen", "t1s1", 1)]
    assert (status(job, "gen")["ok"], status(job, "depth")["ok"]) == (8, 10)


def test_an_image_that_is_not_the_indexed_one_has_no_target(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = stage.Corpus.read

    def flipped(self: Any, tar: Any, offset: int, nbytes: int) -> bytes:
        data = bytearray(read(self, tar, offset, nbytes))
        data[-1] ^= tar.name.endswith("0")
        return bytes(data)

    monkeypatch.setattr(stage.Corpus, "read", flipped)
    run_pipeline(world.config(tmp_path))
    (job,) = open_jobs(world.config(tmp_path))
    reasons = {f["reason"] for f in failed_images(job) if f["tar"] == job.corpus.tars[0].name}
    assert reasons == {"its bytes are not those that were indexed"}
    assert status(job, "depth")["failed"] == job.corpus.tars[0].images + 1


@pytest.mark.parametrize("damage", [Path.unlink, lambda tar: os.truncate(tar, 3000)])
def test_a_tar_that_is_gone_or_cut_stops_the_job_by_name(world: Any, tmp_path: Path, damage: Any) -> None:
    tar = tmp_path / "cut.tar"
    shutil.copy(world.folder / "0.tar", tar)
    adopt([tar], tmp_path / "corpus")
    damage(tar)
    with pytest.raises(OlaError, match=r"cut\.tar"):
        run_pipeline(world.config(tmp_path / "run", f"data.all.corpus={tmp_path / 'corpus'}"))


# ---- once


def test_promise_3_once_a_finished_run_computes_nothing(
    world: Any, own: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(own / "targets")
    stamps = {p: p.stat().st_mtime_ns for p in (own / "targets").rglob("*")}
    monkeypatch.setattr(InProcess, "__enter__", lambda self: pytest.fail("no executor is needed"))
    summary = run_pipeline(world.config(own))
    assert summary["computed_images"] == 0
    assert tree(own / "targets") == before
    assert {p: p.stat().st_mtime_ns for p in (own / "targets").rglob("*")} == stamps


@pytest.mark.parametrize("override", ["featurize.workers=2", "featurize.decode_threads=5"])
def test_promise_3_once_threads_and_workers_do_not_show(
    world: Any, unbroken: Path, tmp_path: Path, tree: Tree, override: str
) -> None:
    run_pipeline(world.config(tmp_path, override))
    assert tree(tmp_path / "targets") == tree(unbroken / "targets")


def test_promise_3_once_only_what_is_missing_is_computed(world: Any, own: Path, unbroken: Path, tree: Tree) -> None:
    (job,) = open_jobs(world.config(own))
    first = job.corpus.tars[0]
    shutil.rmtree(job.sets["seg"].path)  # a teacher dropped
    job.sets["gen"].commit_file(first).unlink()  # a tar lost
    kept = {p: p.stat().st_mtime_ns for p in job.sets["depth"].path.rglob("*")}
    run_pipeline(world.config(own))
    assert tree(own / "targets") == tree(unbroken / "targets")
    assert {p: p.stat().st_mtime_ns for p in job.sets["depth"].path.rglob("*")} == kept


def test_promise_3_once_a_full_disk_costs_nothing_that_was_committed(
    world: Any, tmp_path: Path, unbroken: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 60:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left") as caught:
            run_pipeline(world.config(tmp_path))
    assert str(tmp_path) in caught.value.filename
    (job,) = open_jobs(world.config(tmp_path))
    assert [f for f in tree(tmp_path / "targets") if f.endswith(".tmp")] == []
    for target in job.sets.values():
        for tar in job.corpus.tars:
            commit = target.commit(tar)
            for row in [] if commit is None else commit.to_pylist():
                if row["status"] == "ok":
                    target.read(row, row["key"])
    run_pipeline(world.config(tmp_path))
    assert tree(tmp_path / "targets") == tree(unbroken / "targets")


def test_promise_3_once_a_second_job_leaves_the_first_ones_tar_alone(
    world: Any, tmp_path: Path, unbroken: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first job holds a tar; the second does the rest, waits, and takes over nothing."""
    config = world.config(tmp_path)
    identities = {task: teachers.load(stated).identity(task) for task, stated in config.teachers.items()}
    (job,) = open_jobs(config, identities)
    first = job.corpus.tars[0]
    held = TarWriter.open(job.sets["depth"], first, tar_blocks([first], 4)[first.name])
    waiting = threading.Event()

    def poll(_: float) -> None:
        waiting.set()
        if held:
            held.__exit__()  # the first job gives up, or is done

    monkeypatch.setattr(stage.time, "sleep", poll)
    run_pipeline(config)
    assert waiting.is_set()
    assert tree(tmp_path / "targets") == tree(unbroken / "targets")


def test_a_worker_reports_what_another_writer_is_at(world: Any, own: Path) -> None:
    config = world.config(own)
    (job,) = open_jobs(config)
    first = job.corpus.tars[0]
    job.sets["gen"].commit_file(first).unlink()
    worker = Worker(config.teachers, config.featurize, {task: s.identity for task, s in job.sets.items()})
    unit = Unit("all", job.corpus.path, own / "targets", first.name)
    with TarWriter.open(job.sets["gen"], first, tar_blocks([first], 4)[first.name]):
        report = worker.run(unit)
    assert (report.busy, report.images) == (["gen"], 0)
    report = worker.run(unit)
    assert (report.busy, report.images) == ([], first.images)


def test_a_worker_tells_what_it_cannot_read_from_what_is_damaged(world: Any, unbroken: Path, tmp_path: Path) -> None:
    tar = Path(shutil.copy(world.folder / "0.tar", tmp_path / "0.tar"))
    adopt([tar], tmp_path / "corpus")
    config = world.config(tmp_path, f"data.all.corpus={tmp_path / 'corpus'}")
    (done,) = open_jobs(world.config(unbroken))
    identities = {task: target.identity for task, target in done.sets.items()}
    open_jobs(config, identities)
    unit = Unit("all", tmp_path / "corpus", tmp_path / "targets", "0")

    def report() -> tuple[str | None, bool]:
        found = Worker(config.teachers, config.featurize, identities).run(unit)
        return found.error, found.elsewhere

    index = unit.corpus / "index" / "0.parquet"
    whole = index.read_bytes()
    index.write_bytes(whole[:-9])
    error, elsewhere = report()
    assert error is not None
    assert (error.split(" (")[0], elsewhere) == (f"{index}: damaged", False)
    index.write_bytes(whole)
    size = tar.stat().st_size
    os.truncate(tar, 3000)
    assert report() == (f"{tar}: 3000 bytes, {size} when it was indexed; it was cut or replaced", False)
    tar.unlink()
    assert report() == (f"{tar}: tar 0 of corpus {unit.corpus} cannot be read (No such file or directory)", True)
    unit.corpus.rename(tmp_path / "not mounted")
    error, elsewhere = report()
    assert error is not None
    assert (error.split(":")[0], elsewhere) == (f"no corpus in {unit.corpus}", True)


@pytest.mark.ray
@pytest.mark.timeout(240)
@pytest.mark.filterwarnings("default")  # Ray's own
def test_promise_3_once_a_killed_ray_worker_is_replaced_and_the_store_is_the_same(
    world: Any, tmp_path: Path, unbroken: Path, tree: Tree
) -> None:
    """The first lease tells the first worker's pid; it is killed for good in the middle of its tar."""
    pytest.importorskip("ray")
    killed: list[int] = []
    stop = threading.Event()

    def kill_the_first() -> None:
        while not killed and not stop.wait(0.005):
            for lease in tmp_path.glob("targets/*/leases/[!.]*"):
                try:
                    killed.append(int(lease.read_text().split()[1]))
                    os.kill(killed[0], 9)
                except (FileNotFoundError, ProcessLookupError):
                    continue
                return

    killer = threading.Thread(target=kill_the_first)
    killer.start()
    try:
        summary = run_pipeline(world.config(tmp_path, "featurize.executor=ray", "featurize.workers=1"))
    finally:
        stop.set()
        killer.join()
    assert killed
    assert killed[0] != os.getpid()
    assert summary["failed"] == 2
    assert tree(tmp_path / "targets") == tree(unbroken / "targets")


def test_ctrl_c_stops_at_the_next_image_and_leaves_no_lease(
    world: Any, tmp_path: Path, unbroken: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(futures: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("featurize.job.as_completed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_pipeline(world.config(tmp_path))
    assert list(tmp_path.glob("targets/*/leases/*")) == []
    run_pipeline(world.config(tmp_path))
    assert tree(tmp_path / "targets") == tree(unbroken / "targets")


# ---- refused


def test_promise_7_identity_a_worker_with_other_weights_is_refused(world: Any, unbroken: Path) -> None:
    config = world.config(unbroken)
    (job,) = open_jobs(config)
    identities = {task: s.identity for task, s in job.sets.items()}
    identities["gen"] = replace(identities["gen"], weights_hash="0" * 32)
    with pytest.raises(OlaError, match=r"teacher of gen on .*weights_hash: '\w{32}-\w{16}' here, '0{32}' wanted"):
        Worker(config.teachers, config.featurize, identities)


def test_promise_7_identity_the_store_of_another_corpus_is_refused(world: Any, own: Path) -> None:
    (own / "targets" / "store.json").write_text('{"schema": 1, "corpus_id": "another"}')
    with pytest.raises(OlaError, match="these targets belong to corpus another, not to corpus"):
        run_pipeline(world.config(own))


def test_promise_7_identity_another_view_is_another_set(world: Any, own: Path) -> None:
    with pytest.raises(OlaError, match=r"view: 'squash' here, 'pad' wanted"):
        open_jobs(world.config(own, "teachers.depth.view=pad"))
    run_pipeline(world.config(own, "teachers.depth.view=pad"))
    assert len(list((own / "targets").glob("depth-*"))) == 2
    (squash,), (pad,) = open_jobs(world.config(own)), open_jobs(world.config(own, "teachers.depth.view=pad"))
    assert squash.sets["depth"].path != pad.sets["depth"].path
    assert squash.sets["seg"].path == pad.sets["seg"].path


def test_promise_7_identity_weights_that_change_between_runs_make_another_set(
    world: Any, own: Path, tmp_path: Path, unbroken: Path, tree: Tree
) -> None:
    weights = Path(shutil.copytree(world.config(own).teachers["gen"].weights, tmp_path / "gen"))
    file = weights / "image_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = next(iter(sorted(tensors)))
    tensors[name] = tensors[name] + torch.finfo(torch.float32).eps
    save_file(tensors, file, {"format": "pt"})
    run_pipeline(world.config(own, f"teachers.gen.weights={weights}"))
    before, after = tree(unbroken / "targets"), tree(own / "targets")
    assert {path: content for path, content in after.items() if path in before} == before
    new = {Path(path).parts[0] for path in after.keys() - before.keys()}
    assert len(new) == 1
    assert next(iter(new)).startswith("gen-")
    with pytest.raises(OlaError, match=r"2 sets of 'gen' targets fit.*weights_hash="):
        open_jobs(world.config(own))


def test_no_gpu_and_nothing_to_do_are_said(world: Any, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(OlaError, match=r"gpus_per_worker is 1\.0, but torch sees no GPU here"):
            run_pipeline(world.config(tmp_path / "a", "featurize.gpus_per_worker=1"))
    with pytest.raises(OlaError, match="no entry of data has targets"):
        run_pipeline(world.config(tmp_path / "b", "data.all.targets=null"))


def test_ray_missing_is_said_with_a_way_out(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OlaError, match=r"pip install \.\[featurize\]`, or featurize\.executor=inprocess"):
        run_pipeline(world.config(tmp_path, "featurize.executor=ray"))


def test_a_grown_corpus_only_adds(world: Any, own: Path) -> None:
    """Blocks of old tars stay where they were, and the arrays grow."""
    corpus = Path(shutil.copytree(world.folder / "corpus", own / "corpus"))
    config = world.config(own, f"data.all.corpus={corpus}")
    (job,) = open_jobs(config)
    paths = [p for target in job.sets.values() for p in target.path.rglob("*") if p.is_file() and p.suffix != ".json"]
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in paths}
    tar = world.folder / "0.tar"
    grown = own / "2.tar"
    grown.write_bytes(_renamed(tar))
    adopt([grown], corpus)
    summary = run_pipeline(config)
    assert (summary["images"], summary["computed_images"]) == (20, 8)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in before} == before


def _renamed(tar: Path) -> bytes:
    """A tar of the same samples, with one more: other content, hence another tar."""
    buffer = io.BytesIO()
    with tarfile.open(tar) as old, tarfile.open(fileobj=buffer, mode="w") as new:
        for member in old.getmembers():
            new.addfile(member, old.extractfile(member))
        image = io.BytesIO()
        Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(image, "PNG")
        text = json.dumps({"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "black"}]})
        for name, data in (("more.png", image.getvalue()), ("more.json", text.encode())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            new.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
