"""Fault injection on a real Ray: after each, a rerun, `verify`, and a byte comparison with an unbroken run's store.

OLAVLM_SOAK=N kills N drivers, with some of their actors, one after the other (default 1).
"""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from featurize.corpus.adopt import adopt
from featurize.stage import failed_images, open_jobs, run_pipeline, status
from featurize.verify import verify
from olavlm.data.corpus import Corpus
from olavlm.errors import OlaError

ROOT = Path(__file__).resolve().parents[2]
SOAK = int(os.environ.get("OLAVLM_SOAK", "1"))
RAY = ["featurize.executor=ray", "featurize.workers=1"]
Tree = Callable[[Path], dict[str, bytes | None]]

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900 + 120 * SOAK), pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Ray for all tests here, joined by this process; its address."""
    ray = pytest.importorskip("ray")
    folder = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("OLAVLM_FAULTS", str(folder))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).parent)]))
        started = ray.init(
            num_cpus=3,  # so many workers are started ahead, and as many are used
            include_dashboard=False,
            object_store_memory=100_000_000,
            log_to_driver=False,
            runtime_env={"worker_process_setup_hook": "faults.arm"},
            _temp_dir=f"/tmp/olavlm-faults-{os.getpid()}",  # a socket's path may not be long
        )
        yield started["address"] if isinstance(started, dict) else started.address_info["address"]
        ray.shutdown()
        shutil.rmtree(f"/tmp/olavlm-faults-{os.getpid()}", ignore_errors=True)


@pytest.fixture
def faults(cluster: str) -> Iterator[Path]:
    """The folder whose files are faults; empty before and after."""
    folder = Path(os.environ["OLAVLM_FAULTS"])
    yield folder
    for file in folder.iterdir():
        file.unlink()


def _published(targets: Path) -> int:
    """Files that are there under their final names."""
    return sum(1 for path in targets.rglob("*") if path.is_file() and not path.name.startswith("."))


def _holders(targets: Path) -> list[int]:
    """The processes that hold leases."""
    found = []
    for lease in targets.glob("*/leases/[!.]*"):
        try:
            found.append(int(lease.read_text().split()[1]))
        except (FileNotFoundError, IndexError):  # just given up
            continue
    return found


def test_promise_3_once_actors_and_drivers_killed_at_random_moments_beside_a_second_job(
    world: Any, cluster: str, faults: Path, tmp_path: Path, unbroken: Path, tree: Tree
) -> None:
    """Each round kills a driver, and an actor of it before; the last one ends beside a job of this process."""
    rng = random.Random(int(os.environ.get("OLAVLM_SEED", "0")))
    targets, total = tmp_path / "targets", _published(unbroken / "targets")
    environment = {**os.environ, "RAY_ADDRESS": cluster, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "featurize", "run", str(world.file), f"run_dir={tmp_path}"]
    for number in range(SOAK):
        if number:
            shutil.rmtree(targets)
        first, second = sorted(rng.sample(range(3, total - 6), 2))
        driver = subprocess.Popen(
            [*command, "featurize.executor=ray", "featurize.workers=2"], cwd=ROOT, env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while driver.poll() is None and _published(targets) < first:
            time.sleep(0.002)
        for victim in _holders(targets)[:1]:
            os.kill(victim, signal.SIGKILL)
        while driver.poll() is None and _published(targets) < second:
            time.sleep(0.002)
        job = threading.Thread(target=run_pipeline, args=[world.config(tmp_path)])
        job.start()  # a second job, while the first dies
        driver.kill()
        driver.wait()
        job.join()
        assert list(verify(world.config(tmp_path))) == []
        assert tree(targets) == tree(unbroken / "targets"), (number, first, second)


def test_promise_3_once_a_zombie_actor_wakes_after_its_lease_was_taken(
    world: Any, faults: Path, tmp_path: Path, unbroken: Path, tree: Tree
) -> None:
    (faults / "stop").touch()
    ended: list[Any] = []
    slow = threading.Thread(target=lambda: ended.append(run_pipeline(world.config(tmp_path, *RAY))))
    slow.start()
    while not (faults / "stopped").exists():
        time.sleep(0.01)
    zombie = int((faults / "stopped").read_text())
    try:
        while Path(f"/proc/{zombie}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.01)
        held = list((tmp_path / "targets").glob("*/leases/[!.]*"))
        assert len(held) == 3
        for lease in held:  # its heart has stopped long ago
            os.utime(lease, (0, 0))
        run_pipeline(world.config(tmp_path))
        assert tree(tmp_path / "targets") == tree(unbroken / "targets")
        stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "targets").rglob("*") if p.is_file()}
    finally:
        os.kill(zombie, signal.SIGCONT)
        slow.join()
    assert ended[0]["failed"] == 2
    assert tree(tmp_path / "targets") == tree(unbroken / "targets")
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    assert list(verify(world.config(tmp_path))) == []


def test_promise_2_atomic_a_disk_that_is_really_full(
    world: Any, faults: Path, tmp_path: Path, unbroken: Path, tree: Tree
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=80k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        config = world.config(tmp_path / "run", *RAY, f"data.all.targets={disk}/targets")
        with pytest.raises(OSError, match="No space left") as caught:
            run_pipeline(config)
        assert caught.value.errno == errno.ENOSPC
        assert list(disk.rglob(".*.tmp")) == []
        subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        config = world.config(tmp_path / "run", f"data.all.targets={disk}/targets")
        run_pipeline(config)
        assert list(verify(config)) == []
        assert tree(disk / "targets") == tree(unbroken / "targets")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_promise_8_nothing_lost_poisoned_tars_nan_and_memory_that_comes_back(
    world: Any, faults: Path, tmp_path: Path, tree: Tree, stored: Any
) -> None:
    """One night with everything: what can be done is done, what cannot is named, and a retry makes it whole."""
    sources = {"good": world.folder / "0.tar", "cut": world.folder / "1.tar", "replaced": world.folder / "0.tar"}
    tars = [Path(shutil.copy(source, tmp_path / f"{name}.tar")) for name, source in sources.items()]
    with open(tars[2], "ab") as file:  # another tar of the same images
        file.write(bytes(10240))
    adopt(tars, tmp_path / "corpus")
    overrides = [f"data.all.corpus={tmp_path / 'corpus'}"]
    run_pipeline(world.config(tmp_path / "whole", *overrides))
    right = {tar: tar.read_bytes() for tar in tars}
    os.truncate(tars[1], 3000)
    corpus = Corpus.open(tmp_path / "corpus")
    poisoned = bytearray(right[tars[2]])
    image = next(e for e in corpus.index(corpus.tar("replaced")).to_pylist() if e["image_index"] == 0)
    poisoned[image["image_offset"] + 30] ^= 1
    tars[2].write_bytes(poisoned)
    (faults / "oom").touch()
    (faults / "nan").touch()

    config = world.config(tmp_path / "night", *overrides, *RAY)
    with pytest.raises(OlaError, match=r"1 tars could not be featurized: all/cut: .*cut\.tar: 3000 bytes, \d+ when it"):
        run_pipeline(config)
    assert not (faults / "oom").exists()
    (job,) = open_jobs(config)
    assert [status(job, task)["committed"] for task in job.sets] == [2, 2, 2]
    reasons = {(f["task"], f["tar"], f["reason"].split(":")[0]) for f in failed_images(job)}
    assert ("depth", "replaced", "its bytes are not those that were indexed") in reasons
    assert ("gen", "good", "features are not finite") in reasons

    for tar, content in right.items():
        tar.write_bytes(content)
    (faults / "nan").unlink()
    config = world.config(tmp_path / "night", *overrides)
    summary = run_pipeline(config, retry_failed=True)
    assert summary["failed"] == 3  # the truncated images
    assert list(verify(config)) == []
    (job,), (whole,) = open_jobs(config), open_jobs(world.config(tmp_path / "whole", *overrides))
    assert stored(job) == stored(whole)
