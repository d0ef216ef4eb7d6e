"""What a job does with its worker, its tars and its temporary folder; nothing here needs Ray."""

import faulthandler
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from featurize import job
from featurize.stage import open_jobs, run_pipeline
from featurize.teachers.unclip import UnClip
from featurize.worker import Report, Unit
from olavlm.config import FeaturizeConfig
from olavlm.data.commit import TarWriter
from olavlm.data.corpus import Corpus
from olavlm.errors import OlaError


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


def test_a_worker_that_hangs_is_ended_and_one_that_works_is_not(
    world: Any, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time begins anew with every batch, and ends with the tar."""
    watched: list[float | None] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, exit: watched.append(seconds))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: watched.append(None))
    config = world.config(tmp_path)
    (done,) = open_jobs(world.config(unbroken))
    identities = {task: target.identity for task, target in done.sets.items()}
    (unit, _) = open_jobs(config, identities)[0].missing()
    actor = job._Actor("", config.teachers, config.featurize, identities)
    actor.open()
    assert actor.run(unit, job._stamp(unit.targets)).images == 7
    batches = 2 + 2 + 2  # at least, of four, three and five images
    assert len(watched) >= 1 + batches + 1
    assert watched == [job.HUNG] * (len(watched) - 1) + [None]


# ---- workers and machines that fail


class RayError(Exception):
    """As Ray's: with what was raised in the worker, or of one that is gone."""

    def __init__(self, cause: Exception | None = None, preempted: bool = False):
        super().__init__(str(cause or "The actor is gone."))
        self.cause, self.preempted = cause, preempted


class Gone(Exception):
    """Raised in a worker: its machine is called away."""


class Handle:
    """An actor, its machine, and ``actor.method.remote(…)``; a call is a tuple until it is waited for."""

    def __init__(self, actor: Any):
        self.actor, self.machine, self.alive = actor, "", True

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: Call(self, name, arguments))


class Call:
    def __init__(self, handle: Handle, name: str, arguments: tuple[Any, ...]):
        self.handle, self.name, self.arguments = handle, name, arguments
        self.result: Any = None


class Machines:
    """As much of Ray as the pool uses: one actor to a machine, one call at a time, the first machine's first."""

    exceptions = SimpleNamespace(RayError=RayError)

    def __init__(self, *names: str):
        self.names, self.here = names, "the job's"
        self._handles: list[Handle] = []

    def is_initialized(self) -> bool:
        return True

    def remote(self, **_: object) -> Callable[[Any], Any]:
        return lambda cls: SimpleNamespace(remote=lambda *arguments: self._start(cls(*arguments)))

    def _start(self, actor: Any) -> Handle:
        self._handles.append(Handle(actor))
        return self._handles[-1]

    def wait(self, calls: list[Call], **_: object) -> tuple[list[Call], list[Call]]:
        free = [name for name in self.names if name not in {h.machine for h in self._handles if h.alive}]
        for handle in (h for h in self._handles if h.alive and not h.machine and free):
            handle.machine = free.pop(0)
        able = [call for call in calls if call.handle.machine]
        if not able:
            return [], calls
        call = min(able, key=lambda call: (call.handle.alive, self.names.index(call.handle.machine)))
        call.result = self._run(call) if call.handle.alive else RayError()
        return [call], [other for other in calls if other is not call]

    def _run(self, call: Call) -> Any:
        self.here = call.handle.machine
        try:
            return getattr(call.handle.actor, call.name)(*call.arguments)
        except Gone:
            call.handle.alive = False
            return RayError(preempted=True)
        except Exception as error:
            return RayError(error)
        finally:
            self.here = "the job's"

    def get(self, call: Call) -> Any:
        if isinstance(call.result, RayError):
            raise call.result
        return call.result

    def kill(self, handle: Handle) -> None:
        handle.alive = False


class Ailing:
    """A worker that is ready when `start` returns, and does with a tar what `work` says; it keeps what `start` gave."""

    def __init__(self, start: Callable[[str], Any], work: Callable[[str, Any, Unit], Report]):
        self._work, self._state = work, start(socket.gethostname())

    def run(self, unit: Unit) -> Report:
        return self._work(socket.gethostname(), self._state, unit)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[dict[str, Report], list[str]]]:
    """Runs eight tars on machines, by default with a worker for each: the reports by tar, and what was said."""

    def run_all(
        machines: Machines,
        work: Callable[[str, Any, Unit], Report],
        start: Callable[[str], Any] = lambda host: None,
        workers: int | None = None,
    ) -> tuple[dict[str, Report], list[str]]:
        monkeypatch.setitem(sys.modules, "ray", machines)
        monkeypatch.setattr(socket, "gethostname", lambda: machines.here)
        monkeypatch.setattr(job, "make_worker", lambda *_, **__: Ailing(start, work))
        said: list[str] = []
        settings = FeaturizeConfig(executor="ray", workers=workers or len(machines.names))
        units = [Unit("all", tmp_path / "corpus", tmp_path / "targets", str(t)) for t in range(8)]
        with job.executor({}, settings, {}, said.append) as pool:
            reports = list(pool.run(units))
        assert sorted(report.unit.tar for report in reports) == [unit.tar for unit in units]
        return {report.unit.tar: report for report in reports}, said

    return run_all


def test_a_worker_that_is_broken_for_good_is_replaced_before_it_fails_at_every_tar(run: Any) -> None:
    """After an illegal access nothing that a process asks of its GPU succeeds."""
    broken: list[dict[str, bool]] = []

    def start(host: str) -> dict[str, bool]:
        broken.append({"now": False})
        return broken[-1]

    def work(host: str, state: dict[str, bool], unit: Unit) -> Report:
        state["now"] |= state is broken[0] and unit.tar == "1"
        if state["now"]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")
        return Report(unit)

    _, said = run(Machines("a"), work, start)
    error = "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert said == [f"a worker is replaced (a, all/1): {error}"]


def test_a_machine_where_everything_fails_takes_no_tar_from_the_others(run: Any) -> None:
    failed: Counter[str] = Counter()

    def work(host: str, state: None, unit: Unit) -> Report:
        if host == "sick":
            failed[unit.tar] += 1
            raise RuntimeError("no")
        return Report(unit)

    run(Machines("sick", "well"), work)
    assert set(failed.values()) == {1}


def test_a_tar_that_one_machine_cannot_read_is_read_by_another(run: Any) -> None:
    def work(host: str, state: None, unit: Unit) -> Report:
        return Report(unit) if host == "well" else Report(unit, error="gone (I/O error)", elsewhere=True)

    reports, said = run(Machines("sick", "well"), work)
    assert {report.error for report in reports.values()} == {None}
    assert said == ["sick cannot read all/0, which is tried again: gone (I/O error)"]


@pytest.mark.parametrize(("names", "workers"), [("a", 1), ("ab", 2), ("a", 2)])
def test_a_tar_that_nobody_can_read_is_reported_after_as_many_attempts(run: Any, names: str, workers: int) -> None:
    """Also where there is no room for one of the workers, for which the tar was kept."""
    tried: Counter[str] = Counter()

    def work(host: str, state: None, unit: Unit) -> Report:
        tried[unit.tar] += 1
        return Report(unit, error="gone", elsewhere=True) if unit.tar == "2" else Report(unit)

    reports, _ = run(Machines(*names), work, workers=workers)
    assert {tar: report.error for tar, report in reports.items() if report.error} == {"2": "gone"}
    assert tried == {**dict.fromkeys("0134567", 1), "2": job.ATTEMPTS}


def test_a_machine_on_which_no_worker_starts_is_named_and_the_others_go_on(run: Any) -> None:
    """Nor is a tar kept for it for ever that the others could not read at first."""
    machines = Machines("well", "bare")
    tried: Counter[str] = Counter()
    refused = 0

    def start(host: str) -> None:
        nonlocal refused
        machines.names = "well", "bare"
        if host == "bare":
            refused += 1
            raise OlaError("no weights here")

    def work(host: str, state: None, unit: Unit) -> Report:
        machines.names = "bare", "well"  # whose next try comes first
        tried[unit.tar] += 1
        return Report(unit, error="not yet", elsewhere=True) if (unit.tar, tried["0"]) == ("0", 1) else Report(unit)

    reports, said = run(machines, work, start)
    assert refused > 3 * 2
    assert reports["0"].error is None
    assert said[1:] == ["a worker did not start, another is tried: on bare: no weights here"]


def test_a_job_ends_when_no_worker_starts_at_all_or_any_more(run: Any) -> None:
    started: list[str] = []

    def refuse(host: str) -> None:
        started.append(host)
        raise OlaError("no weights here")

    def once(host: str) -> None:
        if started:
            refuse(host)
        started.append(host)

    def work(host: str, state: None, unit: Unit) -> Report:
        raise RuntimeError("no")

    with pytest.raises(OlaError, match=r"^on a: no weights here$"):
        run(Machines("a"), work, refuse)
    assert started == ["a"]
    started.clear()
    with pytest.raises(OlaError, match=r"^featurize: 3 workers in a row did not start: on a: no weights here$"):
        run(Machines("a"), work, once)


def test_a_machine_that_has_lost_its_store_is_named_and_the_others_go_on(run: Any) -> None:
    machines = Machines("well", "sick")

    def work(host: str, state: None, unit: Unit) -> Report:
        machines.names = ("well", "sick") if host == "sick" else ("sick", "well")  # each after the other
        if host == "sick":
            raise OlaError("another store")
        return Report(unit)

    _, said = run(machines, work)
    assert said == ["a worker is replaced (sick, all/3): on sick: another store"]  # and again, which is not said


def test_a_store_that_is_lost_everywhere_ends_the_job(run: Any) -> None:
    machines, done = Machines("a", "b"), 0

    def work(host: str, state: None, unit: Unit) -> Report:
        nonlocal done
        machines.names = ("b", "a") if host == "a" else ("a", "b")
        done += 1
        if done > 4:
            raise OlaError("no store")
        return Report(unit)

    with pytest.raises(OlaError, match=r"^on [ab]: no store$"):
        run(machines, work)


def test_machines_that_are_called_away_cost_no_attempt(run: Any) -> None:
    times = iter(range(100))

    def work(host: str, state: None, unit: Unit) -> Report:
        if next(times) < 3 * job.ATTEMPTS:
            raise Gone
        return Report(unit)

    run(Machines("spot"), work)
