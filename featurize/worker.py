"""One corpus tar in, committed targets out: every image is read and decoded once and feeds all teachers.

Decoding (threads), the teachers' forward passes (this thread) and quantize-and-write (one thread) overlap through two
bounded queues, so that memory holds a few batches and one block per teacher whatever the size of the tar.
"""

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from featurize import teachers
from featurize.teachers.base import Teacher
from olavlm.config import FeaturizeConfig, TeacherConfig
from olavlm.data import codec
from olavlm.data.amend import TarAmender
from olavlm.data.commit import TarWriter, tar_blocks
from olavlm.data.corpus import Corpus, Tar, content_hash
from olavlm.data.images import decode_image
from olavlm.data.lease import LeaseLost
from olavlm.data.objects import AnyPath
from olavlm.data.targets import Identity, TargetSet, TargetStore
from olavlm.errors import OlaError, Unreadable

T = TypeVar("T")
R = TypeVar("R")

Writer = TarWriter | TarAmender


@dataclass(frozen=True)
class Unit:
    """One tar of one corpus, and the store its targets go to."""

    data: str  # name in the pipeline
    corpus: AnyPath
    targets: AnyPath
    tar: str
    retry_failed: bool = False  # also try images again that were committed as failed


@dataclass
class Report:
    """What came of a unit."""

    unit: Unit
    images: int = 0  # run through the teachers now, failed ones included
    failed: list[tuple[str, int, str]] = field(default_factory=list)  # key, image index, reason
    busy: list[str] = field(default_factory=list)  # tasks another writer is at
    error: str | None = None  # why nothing can be made of this tar, though of others
    elsewhere: bool = False  # another machine may well be able to: what is wrong is that this one cannot read it
    seconds: float = 0.0
    forward_seconds: float = 0.0  # of them, in the teachers


class Stopped(Exception):
    """The worker was told to stop; nothing of the tar it was at is committed."""


@dataclass
class _Sample:
    """A row of the index on its way: its image ready for each teacher, or why there is none, by task."""

    row: dict[str, Any]
    pixels: dict[str, Tensor] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


class Worker:
    """Holds the teachers and turns units into commits.

    Args:
        configs: the teachers, by task.
        settings: device, threads and block size.
        identities: what the job found these teachers to be; on another machine they could be other weights.
        lanes: how many tars are read, and batches computed, at the same time. `run` may be called by more threads: a
            tar is begun when all images of one before are decoded, while that one is being finished and committed.
        moved: is called with every batch, by any thread.

    Raises:
        OlaError: a teacher's weights are missing, do not fit or are others; or a GPU is asked for and there is none.
    """

    def __init__(
        self,
        configs: dict[str, TeacherConfig],
        settings: FeaturizeConfig,
        identities: dict[str, Identity],
        lanes: int = 1,
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        gpu = settings.gpus_per_worker > 0
        if gpu and not torch.cuda.is_available():
            raise OlaError(f"featurize.gpus_per_worker is {settings.gpus_per_worker}, but torch sees no GPU here")
        self.settings = settings
        self.teachers: dict[str, Teacher] = {
            task: teachers.load(config, "cuda" if gpu else "cpu") for task, config in configs.items()
        }
        self.identities = identities
        self._moved = moved
        self._stop = threading.Event()
        self._corpora: dict[AnyPath, tuple[Corpus, dict[str, range]]] = {}
        self._reading, self._computing = threading.Semaphore(lanes), threading.Semaphore(lanes)
        for task, teacher in self.teachers.items():
            here = teacher.identity(task)
            if here != identities[task]:
                wanted = asdict(identities[task])
                wrong = [f"{k}: {v!r} here, {wanted[k]!r} wanted" for k, v in asdict(here).items() if v != wanted[k]]
                raise OlaError(f"teacher of {task} on {socket.gethostname()}: {'; '.join(wrong)}")
            _ = teacher.model  # read now: later two threads would

    def stop(self) -> None:
        """Make every `run` under way, in whatever thread, give up at its next image."""
        self._stop.set()

    def run(self, unit: Unit) -> Report:
        """Commit what the unit lacks. What is committed already, or in another writer's hands, is left alone.

        A tar that is unreadable, or not what was indexed or committed, is reported as such.

        Raises:
            OlaError: the store cannot be opened.
            OSError: the disk is full, for example; nothing half-written stays visible.
        """
        report = Report(unit)
        with ExitStack() as reading:
            reading.enter_context(self._reading)
            self._run(unit, report, reading.close)
        return report

    def _run(self, unit: Unit, report: Report, read: Callable[[], None]) -> None:
        try:
            corpus, blocks = self._open_corpus(unit)
        except OlaError as error:  # whoever made the unit could
            report.error, report.elsewhere = str(error), True
            return
        store = TargetStore.open(unit.targets, corpus.id)
        sets = {
            task: store.add(identity, self.settings.block, self.settings.format)
            for task, identity in self.identities.items()
        }
        try:
            self._commit(corpus, corpus.tar(unit.tar), blocks, sets, report, read)
        except OlaError as error:
            report.error = str(error)
            report.elsewhere = isinstance(error, Unreadable)  # damage is the same everywhere, a mount is not

    def _open_corpus(self, unit: Unit) -> tuple[Corpus, range]:
        """The unit's corpus, and its tar's blocks; kept from unit to unit until it has grown.

        The list of a million tars takes longer to read than a tar to featurize.
        """
        known = self._corpora.get(unit.corpus)
        if known is None or unit.tar not in known[1]:
            corpus = Corpus.open(unit.corpus)
            known = corpus, tar_blocks(corpus.tars, self.settings.block)
            self._corpora[unit.corpus] = known
        corpus, blocks = known
        return corpus, blocks[corpus.tar(unit.tar).name]

    def _commit(
        self,
        corpus: Corpus,
        tar: Tar,
        blocks: range,
        sets: dict[str, TargetSet],
        report: Report,
        read: Callable[[], None],
    ) -> None:
        with ExitStack() as leases:
            writers: dict[str, Writer] = {}
            writer: Writer | None
            for task, target in sets.items():
                commit = target.commit(tar)
                if commit is None:
                    writer = TarWriter.open(target, tar, blocks)
                elif report.unit.retry_failed and "failed" in commit["status"].to_pylist():
                    writer = TarAmender.open(target, tar, blocks)
                else:
                    continue
                if writer is None:
                    report.busy.append(task)
                else:
                    leases.enter_context(writer)
                    writers[task] = writer
            if writers:
                try:
                    self._featurize(corpus, tar, writers, report, read)
                except LeaseLost:
                    report.busy += writers

    def _featurize(
        self, corpus: Corpus, tar: Tar, writers: dict[str, Writer], report: Report, read: Callable[[], None]
    ) -> None:
        """Commit the tar's targets; calls `read` when all its images are decoded."""
        start = time.perf_counter()
        index = corpus.index(tar).to_pylist()
        positions: dict[str, Container[int]] = {
            task: writer.failed if isinstance(writer, TarAmender) else range(len(index))
            for task, writer in writers.items()
        }
        rows = [(i, row) for i, row in enumerate(index) if any(i in wanted for wanted in positions.values())]
        waiting: dict[str, list[_Sample]] = {task: [] for task in writers}
        failed: dict[tuple[str, int], str] = {}

        def prepare(numbered: tuple[int, dict[str, Any]]) -> _Sample:
            i, row = numbered
            return _prepare(corpus, tar, row, {t: self.teachers[t] for t, wanted in positions.items() if i in wanted})

        with (
            ThreadPoolExecutor(self.settings.decode_threads, "decode") as decoders,
            ThreadPoolExecutor(1, "write") as writing,
        ):
            written = _Bounded(writing, 4)
            ahead = 2 * max(self.teachers[task].config.batch_size for task in writers)
            for (i, _), sample in zip(rows, _ahead(decoders, prepare, rows, ahead), strict=True):
                if self._stop.is_set():
                    raise Stopped(f"{report.unit.data}/{tar.name}")
                report.images += sample.row["image_index"] >= 0
                for task in (task for task, wanted in positions.items() if i in wanted):
                    waiting[task].append(sample)
                    if sum(task in s.pixels for s in waiting[task]) == self.teachers[task].config.batch_size:
                        self._forward(task, waiting[task], writers[task], written, failed, report)
                        waiting[task] = []
            read()
            for task, rest in waiting.items():
                self._forward(task, rest, writers[task], written, failed, report)
            written.finish()
        for writer in writers.values():
            writer.commit()
        report.failed = [(key, index, reason) for (key, index), reason in failed.items()]
        report.seconds = time.perf_counter() - start

    def _forward(
        self,
        task: str,
        samples: list[_Sample],
        writer: Writer,
        written: "_Bounded",
        failed: dict[tuple[str, int], str],
        report: Report,
    ) -> None:
        """Encode one batch, padded to its fixed size so that results do not depend on how a tar is cut into batches."""
        self._moved()
        teacher = self.teachers[task]
        pixels = [sample.pixels.pop(task) for sample in samples if task in sample.pixels]
        features = None
        if pixels:
            padding = [torch.zeros_like(pixels[0])] * (teacher.config.batch_size - len(pixels))
            batch = torch.stack(pixels + padding)
            with self._computing:
                start = time.perf_counter()
                features = teacher.encode(batch)[: len(pixels)]
                if features.is_cuda:
                    torch.cuda.synchronize()
                report.forward_seconds += time.perf_counter() - start
        rows = [(sample.row, sample.reasons.get(task)) for sample in samples]
        written.submit(_write, writer, rows, features, teacher.config.codec, failed)


def _prepare(corpus: Corpus, tar: Tar, row: dict[str, Any], used: dict[str, Teacher]) -> _Sample:
    """Read, check and decode one image, and make it what each teacher takes."""
    sample = _Sample(row)
    if row["image_index"] < 0:
        return sample
    data = corpus.read(tar, row["image_offset"], row["image_bytes"])
    try:
        if content_hash(data) != row["image_hash"]:
            raise ValueError("its bytes are not those that were indexed")
        image = decode_image(data)
    except ValueError as error:
        sample.reasons = dict.fromkeys(used, str(error))
        return sample
    for task, teacher in used.items():
        try:
            sample.pixels[task] = teacher.preprocess(image)
        except ValueError as error:
            sample.reasons[task] = str(error)
    return sample


def _write(
    writer: TarWriter,
    rows: list[tuple[dict[str, Any], str | None]],
    features: Tensor | None,
    name: Any,
    failed: dict[tuple[str, int], str],
) -> None:
    """Quantize a batch and append it to the writer, in the order of the index."""
    targets = iter(() if features is None else features)
    for row, reason in rows:
        key, index, image_hash = row["key"], row["image_index"], row["image_hash"]
        if index < 0:
            writer.no_image(key)
            continue
        try:
            if reason is not None:
                raise ValueError(reason)
            target = next(targets)
            values, scales = codec.encode(target[None], name)
        except ValueError as error:
            failed[key, index] = str(error)
            writer.fail(key, index, image_hash, str(error))
            continue
        rms, absmax = float(target.square().mean().sqrt()), float(target.abs().max())
        writer.add(key, index, image_hash, values[0], None if scales is None else scales[0], rms, absmax)


def _ahead(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """``map`` in the pool, in order, at most `ahead` results waiting."""
    futures: deque[Future[R]] = deque()
    try:
        for item in items:
            futures.append(pool.submit(function, item))
            if len(futures) == ahead:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        for future in futures:
            future.cancel()


class _Bounded:
    """Submits to a one-thread pool, waiting when more than `limit` calls are under way; the first error comes back."""

    def __init__(self, pool: ThreadPoolExecutor, limit: int):
        self._pool, self._limit = pool, limit
        self._futures: deque[Future[None]] = deque()

    def submit(self, function: Callable[..., None], *arguments: Any) -> None:
        self._futures.append(self._pool.submit(function, *arguments))
        if len(self._futures) > self._limit:
            self._futures.popleft().result()

    def finish(self) -> None:
        while self._futures:
            self._futures.popleft().result()
