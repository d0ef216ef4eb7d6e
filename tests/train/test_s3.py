"""The trainer reads the same batches from an object store as from a disk, and each byte once where a cache has room."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from olavlm.config import PipelineConfig
from olavlm.data.objects import ObjectPath
from olavlm.errors import OlaError
from train import student
from train.loader import Loader, MicroBatch
from train.snapshot import Request, Snapshot

TASKS = ["depth", "gen"]


def batches(config: Any, folder: Path) -> list[list[MicroBatch]]:
    snapshot = Snapshot.open(folder, config, Request("t", ("all",), tuple(TASKS), "squash", False, 0.1))
    _, processor = student.create(config)
    return list(Loader(snapshot, processor, TASKS, 128, range(6), lambda s: [np.arange(s * 4, s * 4 + 4)], 3))


def same(here: list[list[MicroBatch]], there: list[list[MicroBatch]]) -> None:
    assert len(here) == len(there) == 6
    for (one,), (other,) in zip(here, there, strict=True):
        assert one.keys == other.keys
        tensors: list[list[torch.Tensor]] = [[], []]
        for batch, found in zip((one, other), tensors, strict=True):
            batch.each(lambda t, found=found: found.append(t) or t)
        assert all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The byte ranges that are asked of the store: object and offset."""
    asked: list[tuple[str, int]] = []
    pread = ObjectPath.pread

    def counted(self: ObjectPath, count: int, offset: int) -> tuple[bytes, int]:
        asked.append((str(self), offset))
        return pread(self, count, offset)

    monkeypatch.setattr(ObjectPath, "pread", counted)
    return asked


@pytest.fixture(params=["zarr", "webdataset"])
def of_form(request: Any, own_world: Any, commit: Callable[..., Any]) -> Any:
    """A world whose targets are in that form."""
    if request.param == "webdataset":
        for task, teacher in own_world.config().teachers.items():
            commit(own_world, task, teacher, form="webdataset")
    return own_world


@pytest.fixture
def remote(of_form: Any, s3: Any, upload: Any) -> Callable[..., PipelineConfig]:
    """The world's pipeline with corpus and targets in a bucket."""
    for name in ("corpus", "targets"):
        upload(of_form.folder / name, s3 / name)
    urls = f"data.all.corpus={s3}/corpus", f"data.all.targets={s3}/targets"
    return lambda *overrides: of_form.config(*urls, *overrides)


def test_batches_from_s3_are_those_from_disk(
    of_form: Any, remote: Callable[..., PipelineConfig], ranges: list[tuple[str, int]], tmp_path: Path
) -> None:
    here, there = batches(of_form.config(), tmp_path / "here"), batches(remote(), tmp_path / "there")
    same(here, there)
    assert ranges
    request = Request("t", ("all",), tuple(TASKS), "squash", False, 0.1)
    Snapshot.open(tmp_path / "there", remote(), request)  # resumes
    asked = len(ranges)
    cached = remote(f"cache={{folder: {tmp_path}/cache, gib: 1}}")
    del ranges[:]
    same(here, batches(cached, tmp_path / "there"))
    assert len(ranges) == asked == len(set(ranges))
    same(here, batches(cached, tmp_path / "there"))
    assert len(ranges) == asked  # nothing is read twice


def test_a_small_cache_serves_what_it_holds(
    of_form: Any, remote: Callable[..., PipelineConfig], ranges: list[tuple[str, int]], tmp_path: Path
) -> None:
    here = batches(of_form.config(), tmp_path / "here")
    cached = remote(f"cache={{folder: {tmp_path}/cache, gib: {20 * 4096 / 2**30}}}")
    same(here, batches(cached, tmp_path / "there"))
    first = len(ranges)
    same(here, batches(cached, tmp_path / "there"))
    assert 0 < len(ranges) - first < first
    assert sum(file.stat().st_blocks * 512 for file in (tmp_path / "cache").glob("??/*")) <= 20 * 4096


@pytest.mark.parametrize("of_form", ["zarr"], indirect=True)
@pytest.mark.parametrize("part", ["corpus/tars/000000.tar", "targets/depth-*/values.zarr/c/0/0/0"])
def test_damage_in_the_store_is_said_and_never_kept(
    of_form: Any, remote: Callable[..., PipelineConfig], s3: ObjectPath, part: str, tmp_path: Path
) -> None:
    here = batches(of_form.config(), tmp_path / "here")
    cached = remote(f"cache={{folder: {tmp_path}/cache, gib: 1}}")
    (file,) = of_form.folder.glob(part)
    whole = file.read_bytes()
    corpus = of_form.corpus()
    image = corpus.index(corpus.tars[0]).to_pylist()[0]
    damaged = bytearray(whole)
    damaged[image["image_offset"] + 50 if part.startswith("corpus") else 5] ^= 1
    (s3 / str(file.relative_to(of_form.folder))).put(bytes(damaged))
    with pytest.raises(OlaError, match=r"sample 's00'.*(changed|damaged)"):
        batches(cached, tmp_path / "there")
    (s3 / str(file.relative_to(of_form.folder))).put(whole)
    same(here, batches(cached, tmp_path / "there"))
