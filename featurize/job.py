"""Running many units: in this process, or on a Ray cluster. Both hand units to the same `Worker`."""

import errno
import fcntl
import logging
import os
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from featurize.watchdog import Watchdog
from featurize.worker import Report, Unit, Worker
from olavlm.config import FeaturizeConfig, TeacherConfig
from olavlm.data.objects import AnyPath
from olavlm.data.targets import Identity
from olavlm.errors import OlaError

ATTEMPTS = 3  # per tar, when a worker dies or stumbles over something that may pass
IN_HAND = 2  # tars a worker has: the next one is read while the last batches of the one before are written
NOTICE = 20.0  # seconds without any worker after which the job says what it waits for
PATIENCE = 1800.0  # and after which it gives up
HUNG = 7200.0  # seconds for a batch, whatever the teacher and the processor, before a worker is given up
GRACE = 10.0  # seconds that workers have to leave their tars after Ctrl-C or an error

Say = Callable[[str], None]


class Executor(Protocol):
    """Runs units and yields their reports as they come, in any order."""

    @property
    def workers(self) -> int:
        """How many workers are there now."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def run(self, units: Iterable[Unit]) -> Iterator[Report]:
        """Every unit's report."""


def executor(
    teachers: dict[str, TeacherConfig], settings: FeaturizeConfig, identities: dict[str, Identity], say: Say
) -> Executor:
    """The executor the pipeline asks for; a context manager. `say` gets what a person who waits should know."""
    if settings.executor == "inprocess":
        return InProcess(teachers, settings, identities)
    return RayPool({task: _absolute(teacher) for task, teacher in teachers.items()}, settings, identities, say)


def _absolute(teacher: TeacherConfig) -> TeacherConfig:
    """The same teacher wherever the worker's process happens to have been started."""
    if not Path(teacher.weights).is_dir():
        return teacher
    return teacher.model_copy(update={"weights": str(Path(teacher.weights).absolute())})


def make_worker(
    teachers: dict[str, TeacherConfig],
    settings: FeaturizeConfig,
    identities: dict[str, Identity],
    lanes: int = 1,
    moved: Callable[[], None] = lambda: None,
) -> Worker:
    """A worker; on a CPU its forward passes use one thread, so that `workers` is what fills the cores.

    How many threads a matrix product uses changes its last bits, and a store must not show how many cores were free.
    """
    if settings.gpus_per_worker == 0:
        torch.set_num_threads(1)
    return Worker(teachers, settings, identities, lanes, moved)


class InProcess:
    """Workers as threads of this process, sharing the teachers: to debug, on small machines, and without ray."""

    def __init__(self, teachers: dict[str, TeacherConfig], settings: FeaturizeConfig, identities: dict[str, Identity]):
        self._arguments = teachers, settings, identities
        self.workers = settings.workers

    def __enter__(self) -> Self:
        self._threads = torch.get_num_threads()
        self._worker = make_worker(*self._arguments, lanes=self.workers)
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._threads)

    def run(self, units: Iterable[Unit]) -> Iterator[Report]:
        """Every unit's report; the first error, or Ctrl-C, stops the others."""
        with ThreadPoolExecutor(IN_HAND * self.workers, "worker") as pool:
            futures = [pool.submit(self._worker.run, unit) for unit in units]
            try:
                for future in as_completed(futures):
                    yield future.result()
            except BaseException:
                self._worker.stop()
                for future in futures:
                    future.cancel()
                raise


class RayPool:
    """A pool of Ray actors that pull tars; joins the cluster RAY_ADDRESS names, or starts a quiet one on this machine.

    It works with the workers the cluster has room for; the others join when there is more. A worker that is lost, alone
    or with its node, or in which something breaks or hangs, is replaced, and its tars are tried again, on another
    machine where there is one: what ails a machine must not use up the attempts of all tars.

    Ray Core rather than Ray Data: a unit runs for minutes and returns a few numbers, so there is nothing to stream, and
    a pool has half the overhead (measured: 20 tasks of 0.2 s on 2 cores take 4.9 s, through Ray Data 9.3 s).
    """

    def __init__(
        self,
        teachers: dict[str, TeacherConfig],
        settings: FeaturizeConfig,
        identities: dict[str, Identity],
        say: Say,
    ):
        self._arguments = teachers, settings, identities
        self._settings, self._say = settings, say
        self._opening: dict[Any, Any] = {}  # actors by the call that will say they are ready
        self._hands: dict[Any, list[Unit]] = {}  # what every ready actor was given
        self._hosts: dict[Any, str] = {}  # the machine of every actor that ever was ready
        self._proven: set[str] = set()  # machines that have done a tar, and found no bad input since
        self._running: dict[Any, tuple[Any, Unit]] = {}
        self._refused = 0  # actors in a row that did not come to be while none was ready
        self._patient = True  # a tar that failed on the machines there are waits for those that start
        self._said: set[str] = set()

    @property
    def workers(self) -> int:
        """See `Executor`."""
        return len(self._hands)

    def __enter__(self) -> Self:
        _show_token()
        try:
            import ray
        except ImportError:
            raise OlaError(
                "featurize.executor is ray, which is not installed: "
                "`pip install .[featurize]`, or featurize.executor=inprocess"
            ) from None
        self._ray: Any = ray
        self._started = not ray.is_initialized()
        self._own: _OwnFolder | None = None
        if self._started:
            self._start()
        # One call more than tars in hand, so that `stop` is heard.
        gpus, calls = self._settings.gpus_per_worker, IN_HAND + 1
        self._actor = self._ray.remote(num_cpus=1, num_gpus=gpus, max_concurrency=calls)(_Actor)
        for _ in range(self._settings.workers):
            self._open()
        return self

    def _start(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        address = os.environ.get("RAY_ADDRESS")
        if address:
            host, _, port = address.rpartition(":")
            try:
                if port.isdigit() and "/" not in host:  # Ray itself would look for somebody there for minutes
                    socket.create_connection((host, int(port)), timeout=10).close()
                self._ray.init(**quiet)
            except (OSError, RuntimeError, ValueError) as error:  # nobody there; another Ray or Python
                raise OlaError(f"RAY_ADDRESS={address}: {' '.join(str(error).split())}") from None
            return
        self._own = _OwnFolder()
        self._ray.init(
            num_cpus=self._settings.workers,  # Ray starts as many processes ahead
            include_dashboard=False,
            _temp_dir=str(self._own.path),
            **quiet,
        )
        wanted = self._settings.workers * self._settings.gpus_per_worker
        found = self._ray.cluster_resources().get("GPU", 0)
        if wanted > found:
            self._stop()
            raise OlaError(f"featurize: workers × gpus_per_worker is {wanted:g} GPUs, Ray finds {found:g} here")

    def _stop(self) -> None:
        if self._started:
            self._ray.shutdown()
        if self._own:
            self._own.remove()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._running:  # an error, or Ctrl-C: let go of the tars, so that no lease has to grow old
                for actor in self._hands:
                    actor.stop.remote()
                self._ray.wait(list(self._running), num_returns=len(self._running), timeout=GRACE)
        finally:
            for actor in (*self._hands, *self._opening.values()):
                self._ray.kill(actor)
            self._stop()

    def run(self, units: Iterable[Unit]) -> Iterator[Report]:
        """Every unit on the next free actor. A broken one is replaced and its tars are tried again, `ATTEMPTS` times.

        Raises:
            OlaError: bad input (unless one machine alone finds it), or no room for any worker for `PATIENCE` seconds,
                at once; or tars that failed every attempt, by name, when all others are done.
            OSError: no space left, at once.
        """
        queue = deque(units)
        failures: dict[Unit, list[str]] = {}  # on which machine each attempt failed
        given_up: list[str] = []
        while queue or self._running:
            self._hand_out(queue, failures)
            done = self._wait()
            if done is None:
                self._patient = False
                continue
            if done in self._opening:
                self._opened(done)
                continue
            actor, unit = self._running.pop(done)
            if actor in self._hands:
                self._hands[actor].remove(unit)
            host = self._hosts[actor]
            try:
                report: Report = self._ray.get(done)
            except self._ray.exceptions.RayError as error:
                self._recover(actor, unit, error)
                if not getattr(error, "preempted", False):  # a machine that is called away says nothing of the tar
                    failures.setdefault(unit, []).append(host)
                if len(failures.get(unit, ())) < ATTEMPTS:
                    queue.append(unit)
                else:
                    given_up.append(f"{unit.data}/{unit.tar}: {_reason(error)}")
                continue
            if report.elsewhere and len(failures.setdefault(unit, [])) < ATTEMPTS - 1:
                self._say_once(host, f"{host} cannot read {unit.data}/{unit.tar}, which is tried again: {report.error}")
                failures[unit].append(host)
                queue.append(unit)
            else:
                if report.error is None:
                    self._proven.add(host)
                yield report
        if given_up:
            raise OlaError(f"{len(given_up)} tars failed {ATTEMPTS} times each: " + " | ".join(given_up))

    def _hand_out(self, queue: deque[Unit], failures: dict[Unit, list[str]]) -> None:
        """One tar to everybody, then one ahead, unless there are no more than the others may soon take.

        A tar that was there when a worker failed goes to a worker alone: what it may do again must not be blamed on
        another one.
        """
        for ahead in range(IN_HAND):
            for actor, hand in self._hands.items():
                if not queue or (ahead and len(queue) <= self._settings.workers):
                    return
                if len(hand) != ahead:
                    continue
                unit = self._first_for(self._hosts[actor], queue, failures)
                if unit is None or (ahead and any(tar in failures for tar in (*hand, unit))):
                    continue
                queue.remove(unit)
                hand.append(unit)
                self._running[actor.run.remote(unit, _stamp(unit.targets))] = actor, unit

    def _first_for(self, host: str, queue: deque[Unit], failures: dict[Unit, list[str]]) -> Unit | None:
        """The first tar that has not failed on this machine; if no worker of another one is there or to come, any."""
        others = {self._hosts[actor] for actor in self._hands}
        if self._opening and self._patient:
            others.add("one that starts")
        return next((u for u in queue if host not in (tried := failures.get(u, ())) or others <= {*tried}), None)

    def _wait(self) -> Any:
        """The next call to be done; None if nobody works and those who start, for whom tars were kept, take too long.

        While there is no worker at all, say what is waited for, and at last give up.
        """
        start, said = time.monotonic(), False
        while True:
            done, _ = self._ray.wait([*self._running, *self._opening], timeout=NOTICE)
            if done:
                return done[0]
            if self._running:
                start = time.monotonic()
                continue
            if self._hands:
                return None
            need = f"1 CPU and {self._settings.gpus_per_worker:g} GPUs on one node"
            nodes = Counter(
                f"{node['Resources'].get('CPU', 0):g} CPU and {node['Resources'].get('GPU', 0):g} GPU"
                for node in self._ray.nodes()
                if node["Alive"]
            )
            found = ", ".join(f"{count} nodes of {resources}" for resources, count in nodes.items())
            if time.monotonic() - start > PATIENCE:
                raise OlaError(
                    f"featurize: no worker could start in {PATIENCE:g} s: each needs {need}, Ray has {found}; "
                    "free or add some, or change featurize.gpus_per_worker"
                )
            if not said:
                self._say(f"waiting for a worker to start: each needs {need}, Ray has {found} (some may be in use)")
                said = True

    def _open(self) -> None:
        actor = self._actor.remote(socket.gethostname(), *self._arguments)
        self._opening[actor.open.remote()] = actor

    def _opened(self, call: Any) -> None:
        """Take an actor in, or try another one in its place.

        Once one has been ready it is the machine's fault that another is not, and the job goes on with those it has.
        """
        actor = self._opening.pop(call)
        try:
            self._hosts[actor] = self._ray.get(call)
        except self._ray.exceptions.RayError as error:
            self._ray.kill(actor)
            if not self._hosts:
                self._raise_if_final(error)
            reason = _reason(error)
            self._say_once(reason, f"a worker did not start, another is tried: {reason}")
            self._patient = False
            self._refused += not self._hands
            if self._refused == ATTEMPTS * self._settings.workers:
                raise OlaError(f"featurize: {self._refused} workers in a row did not start: {reason}") from None
            self._open()
        else:
            self._hands[actor] = []
            self._refused = 0
            self._patient = True

    def _recover(self, actor: Any, unit: Unit, error: Exception) -> None:
        """Replace an actor that is gone or broken, unless going on is pointless.

        After an error that is none of ours (CUDA's, most often) its process may be good for nothing any more, and fail
        at whatever it is given. Bad input that another machine does not find is a machine's that has lost its store.
        """
        host, reason = self._hosts[actor], _reason(error)
        bad_input = isinstance(getattr(error, "cause", None), OlaError)
        if bad_input:
            self._proven.discard(host)
        if not (bad_input and self._proven):
            self._raise_if_final(error)
        if self._hands.pop(actor, None) is not None:
            self._say_once(f"{host} {reason}", f"a worker is replaced ({host}, {unit.data}/{unit.tar}): {reason}")
            self._ray.kill(actor)  # it may only be out of reach, and would keep its place
            self._open()

    def _say_once(self, what: str, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self._say(text)

    def _raise_if_final(self, error: Exception) -> None:
        """Bad input and full disks do not pass."""
        cause = getattr(error, "cause", None)
        if isinstance(cause, OlaError):
            raise OlaError(str(cause)) from None
        if isinstance(cause, OSError) and cause.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise cause


class _Actor:
    """A worker inside a Ray actor, made by `open`, so that its errors arrive like any other."""

    def __init__(
        self,
        job_host: str,
        teachers: dict[str, TeacherConfig],
        settings: FeaturizeConfig,
        identities: dict[str, Identity],
    ):
        self._job_host = job_host
        self._arguments = teachers, settings, identities
        self._watchdog = Watchdog(HUNG)
        self._worker: Worker

    def open(self) -> str:
        """Load the teachers; on which machine that is."""
        with self._where():
            self._worker = make_worker(*self._arguments, moved=self._watchdog.moved)
        return socket.gethostname()

    def run(self, unit: Unit, stamp: tuple[int, int] | None) -> Report:
        """Run the unit, if its store is the one that the job sees."""
        with self._where(), self._watchdog:
            if _stamp(unit.targets) != stamp:
                raise OlaError(
                    f"{unit.targets}: not the store that the job on {self._job_host} sees under that name; "
                    "a store must lie on a file system that all nodes share"
                )
            return self._worker.run(unit)

    def stop(self) -> None:
        """Leave the tars at hand; nothing of them is committed."""
        self._worker.stop()

    @contextmanager
    def _where(self) -> Iterator[None]:
        """Say on which machine the paths of an error message are, if it is not the job's."""
        try:
            yield
        except OlaError as error:
            host = socket.gethostname()
            raise error if host == self._job_host else OlaError(f"on {host}: {error}") from None


def _stamp(targets: AnyPath) -> tuple[int, int] | None:
    """What tells a store from another one, or a copy, under the same name on another machine; None for a URL."""
    if not isinstance(targets, Path):
        return None
    try:
        found = (targets / "store.json").stat()
    except FileNotFoundError:
        return -1, -1
    return found.st_ino, found.st_mtime_ns


def _show_token() -> None:
    """Make Ray, if it is not loaded yet, show its token to the cluster that RAY_ADDRESS names.

    ``ray start`` guards a cluster where a token lies, but whoever joins it shows his only when told to (Ray 2.60).
    """
    there = Path("~/.ray/auth_token").expanduser().exists()
    given = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if "RAY_ADDRESS" in os.environ and "ray" not in sys.modules and (there or given):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


class _OwnFolder:
    """Where a Ray of our own keeps its session; a lock on it, which dies with us, tells the next job what was left."""

    _PREFIX = "olavlm-ray-"

    def __init__(self) -> None:
        for folder in Path(tempfile.gettempdir()).glob(f"{self._PREFIX}*"):
            try:
                if any(folder.iterdir()):  # an empty one may be about to be locked
                    os.close(_lock(folder))
                    shutil.rmtree(folder, ignore_errors=True)
            except OSError:  # its owner lives, it is another user's, or somebody else just removed it
                continue
        self.path = Path(tempfile.mkdtemp(prefix=self._PREFIX))
        self._lock = _lock(self.path)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _lock(folder: Path) -> int:
    """A descriptor that holds the folder's lock.

    Raises:
        OSError: somebody else holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _reason(error: Exception) -> str:
    """One line: the first of what was raised in a worker (CUDA's go on with advice), or the last of Ray's own."""
    cause = getattr(error, "cause", None)
    if cause is None:
        return str(error).strip().splitlines()[-1]
    text = (str(cause).strip() or "no message").splitlines()[0]
    return text if isinstance(cause, OlaError) else f"{type(cause).__name__}: {text}"
