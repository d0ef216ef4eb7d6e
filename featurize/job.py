"""Running many units: in this process, or on a Ray cluster. Both hand units to the same `Worker`."""

import errno
import logging
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from featurize.worker import Report, Unit, Worker
from olavlm.config import FeaturizeConfig, TeacherConfig
from olavlm.data.targets import Identity
from olavlm.errors import OlaError

ATTEMPTS = 3  # per tar, when a worker dies or stumbles over something that may pass


class Executor(Protocol):
    """Runs units and yields their reports as they come, in any order."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def run(self, units: Iterable[Unit]) -> Iterator[Report]:
        """Every unit's report."""


def executor(
    teachers: dict[str, TeacherConfig], settings: FeaturizeConfig, identities: dict[str, Identity]
) -> Executor:
    """The executor the pipeline asks for; a context manager."""
    kind = InProcess if settings.executor == "inprocess" else RayPool
    return kind(teachers, settings, identities)


def make_worker(*arguments: Any) -> Worker:
    """A worker; on a CPU its forward passes use one thread, so that `workers` is what fills the cores.

    How many threads a matrix product uses changes its last bits, and a store must not show how many cores were free.
    """
    settings: FeaturizeConfig = arguments[1]
    if settings.gpus_per_worker == 0:
        torch.set_num_threads(1)
    return Worker(*arguments)


class InProcess:
    """Workers as threads of this process, sharing the teachers: to debug, on small machines, and without ray."""

    def __init__(self, *arguments: Any):
        self._arguments = arguments
        self._settings: FeaturizeConfig = arguments[1]

    def __enter__(self) -> Self:
        self._threads = torch.get_num_threads()
        self._worker = make_worker(*self._arguments)
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._threads)

    def run(self, units: Iterable[Unit]) -> Iterator[Report]:
        """Every unit's report; the first error, or Ctrl-C, stops the others."""
        with ThreadPoolExecutor(self._settings.workers, "worker") as pool:
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

    Ray Core rather than Ray Data: a unit runs for minutes and returns a few numbers, so there is nothing to stream, and
    a pool has half the overhead (measured: 20 tasks of 0.2 s on 2 cores take 4.9 s, through Ray Data 9.3 s).
    """

    def __init__(self, *arguments: Any):
        self._arguments = arguments
        self._settings: FeaturizeConfig = arguments[1]

    def __enter__(self) -> Self:
        try:
            import ray
        except ImportError:
            raise OlaError(
                "featurize.executor is ray, which is not installed: "
                "`pip install .[featurize]`, or featurize.executor=inprocess"
            ) from None
        self._ray: Any = ray
        self._folder: str | None = None
        if not ray.is_initialized():
            self._start()
        self._actor: Any = ray.remote(num_cpus=1, num_gpus=self._settings.gpus_per_worker)(_Actor)
        self._actors = [self._actor.remote(*self._arguments) for _ in range(self._settings.workers)]
        return self

    def _start(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if os.environ.get("RAY_ADDRESS"):
            self._ray.init(**quiet)
            return
        self._folder = tempfile.mkdtemp(prefix="olavlm-ray-")
        self._ray.init(
            num_cpus=max(os.cpu_count() or 1, self._settings.workers),
            include_dashboard=False,
            _temp_dir=self._folder,
            **quiet,
        )
        wanted = self._settings.workers * self._settings.gpus_per_worker
        found = self._ray.cluster_resources().get("GPU", 0)
        if wanted > found:  # the actors would wait forever
            self._stop()
            raise OlaError(f"featurize: workers × gpus_per_worker is {wanted:g} GPUs, Ray finds {found:g} here")

    def _stop(self) -> None:
        if self._folder:
            self._ray.shutdown()
            shutil.rmtree(self._folder, ignore_errors=True)

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._stop()

    def run(self, units: Iterable[Unit]) -> Iterator[Report]:
        """Every unit on the next free actor. A dead actor is replaced and its tar tried again, `ATTEMPTS` times in all.

        Raises:
            OlaError: bad input, at once; or tars that failed every attempt, by name, when all others are done.
            OSError: no space left, at once.
        """
        queue = deque(units)
        attempts: dict[Unit, int] = {}
        given_up: list[str] = []
        idle = list(self._actors)
        running: dict[Any, tuple[Any, Unit]] = {}
        while queue or running:
            while idle and queue:
                actor, unit = idle.pop(), queue.popleft()
                running[actor.run.remote(unit)] = actor, unit
            (done, *_), _rest = self._ray.wait(list(running))
            actor, unit = running.pop(done)
            try:
                yield self._ray.get(done)
                idle.append(actor)
            except self._ray.exceptions.RayError as error:
                idle.append(self._recover(actor, error))
                attempts[unit] = attempts.get(unit, 0) + 1
                if attempts[unit] < ATTEMPTS:
                    queue.append(unit)
                else:
                    given_up.append(f"{unit.data}/{unit.tar}: {_last_line(error)}")
        if given_up:
            raise OlaError(f"{len(given_up)} tars failed {ATTEMPTS} times each: " + " | ".join(given_up))

    def _recover(self, actor: Any, error: Exception) -> Any:
        """The actor to go on with after an error, unless going on is pointless."""
        cause = getattr(error, "cause", None)
        if isinstance(cause, OlaError):
            raise OlaError(str(cause)) from None
        if isinstance(cause, OSError) and cause.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise cause
        if isinstance(error, self._ray.exceptions.RayActorError):
            self._actors.remove(actor)
            actor = self._actor.remote(*self._arguments)
            self._actors.append(actor)
        return actor


class _Actor:
    """A worker inside a Ray actor. Made on first use, so that its errors arrive like any other."""

    def __init__(self, *arguments: Any):
        self._arguments = arguments
        self._worker: Worker | None = None

    def run(self, unit: Unit) -> Report:
        if self._worker is None:
            self._worker = make_worker(*self._arguments)
        return self._worker.run(unit)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
