"""The whole of featurization against an S3 API: the promises hold there, and the bytes are those of a disk."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from featurize.corpus import build
from featurize.stage import open_jobs, run_pipeline, status
from featurize.verify import verify
from olavlm.config import WebDatasetSource
from olavlm.data.corpus import Corpus
from olavlm.errors import OlaError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", params=["zarr", "webdataset"])
def on_disk(world: Any, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[str, Path]:
    """A form, and a finished run in it."""
    run = tmp_path_factory.mktemp(request.param)
    run_pipeline(world.config(run, f"featurize.format={request.param}"))
    return request.param, run / "targets"


@pytest.fixture
def adopted(world: Any, s3: Any, tmp_path: Path, upload: Any) -> str:
    """The world's corpus, adopted from tars in the bucket, its index uploaded there, too."""
    for name in ("0.tar", "1.tar"):
        (s3 / "tars" / name).put((world.folder / name).read_bytes())
    build(WebDatasetSource(kind="webdataset", tars=f"{s3}/tars/[0-9].tar"), tmp_path / "index")
    upload(tmp_path / "index", s3 / "corpus")
    return f"{s3}/corpus"


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_store_in_s3_of_a_corpus_in_s3_is_the_one_on_disk(
    world: Any, on_disk: tuple[str, Path], s3: Any, adopted: str, tmp_path: Path, objects: Any
) -> None:
    form, folder = on_disk
    assert Corpus.open(adopted).id == world.corpus().id
    overrides = [f"data.all.corpus={adopted}", f"data.all.targets={s3}/targets", f"featurize.format={form}"]
    config = world.config(tmp_path / "run", *overrides, "featurize.workers=2")
    summary = run_pipeline(config)
    assert (summary["images"], summary["failed"], summary["computed_images"]) == (12, 2, 12)
    assert objects(s3 / "targets") == files(folder)
    assert list(verify(config, recompute=2)) == []
    (job,) = open_jobs(config)
    assert status(job, "depth")["ok"] == 10
    before = objects(s3)
    assert run_pipeline(config)["computed_images"] == 12  # of the run before: nothing was missing
    assert objects(s3) == before


@pytest.mark.timeout(900)
def test_promise_3_once_killed_anywhere_in_s3_and_rerun_the_store_is_the_unbroken_one(
    world: Any, s3: Any, tmp_path: Path, objects: Any
) -> None:
    script = Path(__file__).with_name("kill_points.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TARGETS_URL": str(s3)}
    command = [sys.executable, str(script), str(world.file), str(tmp_path), "run:9"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    points = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(points) >= 3
    whole = objects(s3 / "unbroken")
    for point in points:
        assert point["killed"], point
        assert point["finished"], (point, done.stderr)
        found = objects(s3 / f"killed-{point['kill_at']}")
        assert {name: data for name, data in found.items() if "/leases/." not in name} == whole, point


def test_corpora_are_made_on_a_disk(tmp_path: Path, s3: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "featurize", "pack", "--captions", str(tmp_path), "--out", f"{s3}/corpus"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {s3}/corpus: corpora are made on a local disk")
    assert not any(tmp_path.iterdir())


def test_no_tar_matches_is_said(s3: Any, tmp_path: Path) -> None:
    with pytest.raises(OlaError, match=r"no file matches 's3://.*/\*\.tar'"):
        build(WebDatasetSource(kind="webdataset", tars=f"{s3}/*.tar"), tmp_path / "index")
