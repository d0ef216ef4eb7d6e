"""What a job does with its worker, its tars and its temporary folder; nothing here needs Ray."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from featurize import job
from featurize.stage import run_pipeline
from featurize.teachers.unclip import UnClip
from olavlm.data.commit import TarWriter
from olavlm.data.corpus import Corpus


def test_a_tar_is_read_while_the_one_before_is_committed(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And still only one batch is computed at a time."""
    read, commit, encode = Corpus.read, TarWriter.commit, UnClip.encode
    tars: set[str] = set()
    both, computing = threading.Event(), threading.Lock()

    def reading(self: Corpus, tar: Any, offset: int, nbytes: int) -> bytes:
        tars.add(tar.name)
        if len(tars) == 2:
            both.set()
        return read(self, tar, offset, nbytes)

    def late(self: TarWriter) -> None:
        assert both.wait(60)
        commit(self)

    def alone(self: UnClip, pixels: torch.Tensor) -> torch.Tensor:
        assert computing.acquire(blocking=False)
        try:
            return encode(self, pixels)
        finally:
            computing.release()

    monkeypatch.setattr(Corpus, "read", reading)
    monkeypatch.setattr(TarWriter, "commit", late)
    monkeypatch.setattr(UnClip, "encode", alone)
    assert run_pipeline(world.config(tmp_path))["computed_images"] == 12


def test_what_a_killed_job_left_in_the_temporary_folder_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job.tempfile, "tempdir", str(tmp_path))
    dead, starting = tmp_path / "olavlm-ray-dead", tmp_path / "olavlm-ray-starting"
    (dead / "session_latest").mkdir(parents=True)
    starting.mkdir()
    living = job._OwnFolder()
    (living.path / "session_latest").mkdir()
    own = job._OwnFolder()
    assert not dead.exists()
    assert all(folder.exists() for folder in (starting, living.path, own.path))
    own.remove()
    living.remove()
    assert list(tmp_path.iterdir()) == [starting]
