"""The trainer reads the same batches from an object store as from a disk."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from train import student
from train.loader import Loader, MicroBatch
from train.snapshot import Request, Snapshot

TASKS = ["depth", "gen"]


def batches(config: Any, folder: Path) -> list[list[MicroBatch]]:
    snapshot = Snapshot.open(folder, config, Request("t", ("all",), tuple(TASKS), "squash", False, 0.1))
    _, processor = student.create(config)
    return list(Loader(snapshot, processor, TASKS, 128, range(6), lambda s: [np.arange(s * 4, s * 4 + 4)], 3))


def test_batches_from_s3_are_those_from_disk(world: Any, s3: Any, upload: Any, tmp_path: Path) -> None:
    for name in ("corpus", "targets"):
        upload(world.folder / name, s3 / name)
    remote = world.config(f"data.all.corpus={s3}/corpus", f"data.all.targets={s3}/targets")
    here, there = batches(world.config(), tmp_path / "here"), batches(remote, tmp_path / "there")
    assert len(here) == len(there) == 6
    for (one,), (other,) in zip(here, there, strict=True):
        assert one.keys == other.keys
        tensors: list[list[torch.Tensor]] = [[], []]
        for batch, found in zip((one, other), tensors, strict=True):
            batch.each(lambda t, found=found: found.append(t) or t)
        assert all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))
    Snapshot.open(tmp_path / "there", remote, Request("t", ("all",), tuple(TASKS), "squash", False, 0.1))  # resumes
