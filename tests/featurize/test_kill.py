"""SIGKILL at any change of the disk: the same command run again ends where an undisturbed one does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from featurize.stage import open_jobs
from olavlm.data.commit import TarWriter, tar_blocks

ROOT = Path(__file__).resolve().parents[2]
#: Every how many changes of the disk each command is killed; 1 in the environment kills at every single one.
EVERY = int(os.environ.get("OLAVLM_KILL_EVERY", "0"))


def _kill(world: Any, folder: Path, **commands: int) -> list[dict[str, Any]]:
    script = Path(__file__).with_name("kill_points.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [f"{command}:{EVERY or every}" for command, every in commands.items()]
    command = [sys.executable, str(script), str(world.file), str(folder), *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    points = [json.loads(line) for line in done.stdout.splitlines()]
    assert {point["command"] for point in points} == set(commands)
    for point in points:
        assert point["killed"], (point, done.stderr)
        assert point["finished"], (point, done.stderr)
        assert point["differs"] == [], point
    return points


@pytest.mark.timeout(7200 if EVERY else 1200)
def test_promise_3_once_killed_anywhere_and_rerun_the_store_is_the_unbroken_one(world: Any, tmp_path: Path) -> None:
    points = _kill(world, tmp_path, run=29)
    assert len(points) >= 3
    assert all(point["commits_untouched"] for point in points)


@pytest.mark.timeout(7200 if EVERY else 1200)
def test_promise_3_once_commands_killed_anywhere_and_rerun_end_alike(
    world: Any, tmp_path: Path, unbroken: Path, stumbled: Path
) -> None:
    for command in ("drop", "export", "compact"):
        shutil.copytree(unbroken / "targets", tmp_path / command / "start" / "targets")
    shutil.copytree(stumbled / "targets", tmp_path / "retry" / "start" / "targets")
    damaged = Path(shutil.copytree(unbroken / "targets", tmp_path / "repair" / "start" / "targets")).parent
    (job,) = open_jobs(world.config(damaged))
    job.sets["depth"].values_file(0).write_bytes(b"")
    job.sets["gen"].commit_file(job.corpus.tars[1]).write_bytes(b"")
    shutil.copytree(unbroken / "targets", tmp_path / "gc" / "start" / "targets")
    (job,) = open_jobs(world.config(tmp_path / "gc" / "start"))
    job.sets["seg"].commit_file(job.corpus.tars[1]).unlink()
    writer = TarWriter.open(
        job.sets["seg"], job.corpus.tars[1], tar_blocks(job.corpus.tars, 4)[job.corpus.tars[1].name]
    )
    assert writer is not None
    writer._lease._released.set()  # it dies now: no heart, and what it wrote stays
    writer._lease.path.write_text("elsewhere 1 0")
    os.utime(writer._lease.path, (0, 0))
    points = _kill(world, tmp_path, retry=13, repair=29, drop=29, gc=7, compact=7, export=3)
    assert len(points) >= 6
