"""The Ray job on a cluster of several nodes, all of them on this machine: losing them, and having too few."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from featurize import job
from featurize.corpus.adopt import adopt
from featurize.stage import run_pipeline
from olavlm.errors import OlaError

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("default"),  # Ray's own
]
Tree = Callable[[Path], dict[str, bytes | None]]
ROOT = Path(__file__).resolve().parents[2]
TARS = 12


class Machines:
    """A Ray cluster whose head runs no workers; nodes come and go as if each were a machine of its own."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address: str = self._cluster.address
        self._nodes: list[Any] = []

    def add(self) -> None:
        """A machine with room for one worker."""
        self._nodes.append(self._cluster.add_node(num_cpus=1))

    def lose(self) -> None:
        """Power loss: SIGKILL for everything that runs on the oldest machine, workers first."""
        node = self._nodes.pop(0)
        raylet = node.all_processes["raylet"][0].process.pid
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(status.read_text().rpartition(")")[2].split()[1])
                if parent == raylet:
                    os.kill(int(status.parent.name), signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError):
                continue
        self._cluster.remove_node(node, allow_graceful=False)

    def lose_all(self) -> None:
        while self._nodes:
            self.lose()

    def shutdown(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    pytest.importorskip("ray")
    cluster = Machines()
    try:
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture
def own_machines(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    """The cluster, named by RAY_ADDRESS; without machines at first, and left so."""
    monkeypatch.setenv("RAY_ADDRESS", machines.address)
    yield machines
    machines.lose_all()


@pytest.fixture(scope="module")
def corpus(world: Any, tmp_path_factory: pytest.TempPathFactory, write_tar: Callable[..., Path]) -> Path:
    """Tars enough for a job to be in the middle of."""
    folder = tmp_path_factory.mktemp("many")
    adopt([write_tar(folder / f"{t:02}.tar", t, 6) for t in range(TARS)], folder / "corpus")
    return folder / "corpus"


@pytest.fixture(scope="module")
def unbroken(world: Any, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("unbroken")
    run_pipeline(world.config(run, f"data.all.corpus={corpus}"))
    return run


def _until(happened: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 600
    while not happened():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_promise_3_once_lost_machines_cost_nothing(
    world: Any,
    corpus: Path,
    unbroken: Path,
    tmp_path: Path,
    tree: Tree,
    own_machines: Machines,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two machines for three workers; one is lost in the middle, then the other, and a new one comes."""
    monkeypatch.setattr(job, "NOTICE", 0.5)
    monkeypatch.setattr(job, "PATIENCE", 600.0)

    def commits() -> int:
        return len(list(tmp_path.glob("targets/*/commits/*.parquet")))

    own_machines.add()
    own_machines.add()
    config = world.config(tmp_path, f"data.all.corpus={corpus}", "featurize.executor=ray", "featurize.workers=3")
    with ThreadPoolExecutor(1) as thread:  # Ray's nodes want to be started by the main one
        running = thread.submit(run_pipeline, config)
        _until(lambda: commits() >= 3)
        own_machines.lose()
        middle = commits()
        _until(lambda: commits() >= middle + 3)
        capfd.readouterr()
        own_machines.lose()
        lost = commits()
        _until(lambda: "waiting for a worker" in capfd.readouterr().err)
        own_machines.add()
        summary = running.result()
    assert lost < 3 * TARS
    assert summary["failed"] == 2
    assert tree(tmp_path / "targets") == tree(unbroken / "targets")


def test_a_tar_that_kills_its_worker_is_named_and_takes_no_other_with_it(
    world: Any, corpus: Path, tmp_path: Path, own_machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "ATTEMPTS", 2)
    own_machines.add()
    config = world.config(tmp_path, f"data.all.corpus={corpus}", "featurize.executor=ray")
    killed: set[int] = set()

    def kill_who_is_at_it() -> bool:
        for lease in tmp_path.glob("targets/*/leases/00.*"):
            with suppress(FileNotFoundError, ProcessLookupError):
                pid = int(lease.read_text().split()[1])
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        return len(killed) == job.ATTEMPTS

    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(run_pipeline, config)
        _until(kill_who_is_at_it)
        with pytest.raises(OlaError, match=r"^1 tars failed 2 times each: all/00: "):
            running.result()
    assert len(list(tmp_path.glob("targets/*/commits/*.parquet"))) == 3 * (TARS - 1)


def test_a_store_of_another_machine_is_refused(
    world: Any, tmp_path: Path, own_machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_machines.add()
    monkeypatch.setattr(job, "_stamp", lambda targets: (1, 1))  # what the store is here
    with pytest.raises(OlaError, match=r"targets: not the store that the job on .* sees under that name"):
        run_pipeline(world.config(tmp_path, "featurize.executor=ray"))
    assert list(tmp_path.glob("targets/*/commits/*")) == []


def test_no_room_for_any_worker_is_said_and_then_an_error(
    world: Any,
    tmp_path: Path,
    own_machines: Machines,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(job, "NOTICE", 0.1)
    monkeypatch.setattr(job, "PATIENCE", 0.3)
    with pytest.raises(OlaError, match=r"no worker could start in 0\.3 s: each needs 1 CPU and 0 GPUs on one node"):
        run_pipeline(world.config(tmp_path, "featurize.executor=ray"))
    assert "waiting for a worker to start" in capfd.readouterr().err


def test_a_cluster_guarded_by_a_token_is_joined_with_the_weights_of_where_the_job_was_started(
    world: Any, weights: Path, tmp_path: Path
) -> None:
    """``ray start`` where a token lies, as any Ray of one's own leaves it, then the job beside it.

    The cluster's processes run elsewhere: a relative path to weights means the job's folder.
    """
    pytest.importorskip("ray")
    token = tmp_path / "home" / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text("0" * 64)
    unguarded = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment = {**unguarded, "HOME": str(tmp_path / "home"), "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    session = tempfile.mkdtemp(prefix="ray-")  # short: Ray's sockets lie in it
    start = ["-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}", "--num-cpus=1"]
    start += ["--include-dashboard=false", f"--temp-dir={session}"]
    run = ["-m", "featurize", "run", str(world.file), f"run_dir={tmp_path}/run", "featurize.executor=ray"]
    run += [f"teachers.{task}.weights={task}" for task in ("depth", "seg", "gen")]
    head = subprocess.Popen([sys.executable, *start], env=environment, stdout=subprocess.DEVNULL)
    try:
        _until(lambda: _listens(port))
        joined = {**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"}
        done = subprocess.run([sys.executable, *run], cwd=weights, env=joined, capture_output=True, text=True)
    finally:
        head.terminate()
        head.wait()
        shutil.rmtree(session, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    assert "12 images" in done.stdout


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def test_nobody_at_ray_address_is_one_clear_error(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(OlaError, match=r"RAY_ADDRESS=127\.0\.0\.1:1: "):
        run_pipeline(world.config(tmp_path, "featurize.executor=ray"))
