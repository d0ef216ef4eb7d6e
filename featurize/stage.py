"""The featurization stage of a pipeline: what is missing, a job for it, and an honest summary."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from featurize import teachers
from featurize.job import executor
from featurize.worker import Report, Unit
from olavlm import runs
from olavlm.config import DataConfig, PipelineConfig
from olavlm.data.atomic import replace
from olavlm.data.commit import describe_arrays, tar_blocks, tidy
from olavlm.data.corpus import Corpus
from olavlm.data.manifest import summaries
from olavlm.data.objects import as_path
from olavlm.data.targets import Identity, TargetSet, TargetStore
from olavlm.errors import OlaError

POLL = 2.0  # seconds between looks at tars that another job holds


@dataclass
class Job:
    """One `data` entry with a store: its corpus, and a target set per task."""

    name: str
    data: DataConfig
    corpus: Corpus
    sets: dict[str, TargetSet]

    def committed(self) -> dict[str, pa.Table]:
        """What is committed of the tars, by task, as `summaries` says; it lists every commit there is."""
        return {task: summaries(target, self.corpus.tars) for task, target in self.sets.items()}

    def missing(self, retry_failed: bool = False) -> list[Unit]:
        """The tars that lack a commit of some task; also those with failed images, if these shall be tried again."""
        corpus, targets = as_path(self.data.corpus).resolve(), as_path(str(self.data.targets)).resolve()
        wanted = np.zeros(len(self.corpus.tars), bool)
        for there in self.committed().values():
            wanted |= there["content"].is_null().to_numpy()
            if retry_failed:
                wanted |= there["failed"].to_numpy() > 0
        return [
            Unit(self.name, corpus, targets, self.corpus.tars[i].name, retry_failed) for i in np.flatnonzero(wanted)
        ]


def open_jobs(config: PipelineConfig, identities: dict[str, Identity] | None = None) -> list[Job]:
    """Every `data` entry that has targets, with its sets found; or made, for these identities.

    Raises:
        OlaError: no such corpus, a store of another corpus, or no set of a teacher the pipeline states.
    """
    jobs = []
    for name, data in config.data.items():
        if data.targets is None:
            continue
        corpus = Corpus.open(data.corpus)
        if identities is None:
            store = TargetStore.open(data.targets, corpus.id)
            sets = {task: store.find(task, teacher) for task, teacher in config.teachers.items()}
        else:
            store = TargetStore.create(data.targets, corpus.id)
            sets = {
                task: store.add(identity, config.featurize.block, config.featurize.format)
                for task, identity in identities.items()
            }
            for target in sets.values():
                tidy(target, corpus.tars)
                describe_arrays(target, rows(corpus, target))
        jobs.append(Job(name, data, corpus, sets))
    if not jobs:
        raise OlaError(f"pipeline {config.name}: no entry of data has targets, so there is nothing to featurize")
    return jobs


def rows(corpus: Corpus, target: TargetSet) -> int:
    """Rows of a set's arrays: of whole blocks."""
    return target.block * sum(map(len, tar_blocks(corpus.tars, target.block).values()))


def run_pipeline(config: PipelineConfig, retry_failed: bool = False) -> dict[str, Any]:
    """Compute every target the pipeline's stores lack; what is committed is never computed again.

    A tar that cannot be read costs its own images only: the others are done first.

    Args:
        config: the pipeline.
        retry_failed: images that were committed as failed are tried again, and only they.

    Returns:
        What is written to ``runs/<pipeline>/featurize/summary.json``; beside it lies ``failed.jsonl``, one line per
        image that has no target: data, task, tar, key, image_index, reason.

    Raises:
        OlaError: tars could not be read, by name, when all others are done; see also `open_jobs`,
            `featurize.teachers.load` and `featurize.job.RayPool.run`.
    """
    if not config.teachers:
        raise OlaError(f"pipeline {config.name}: teachers is empty, so there is nothing to featurize")
    console = Console(stderr=True)
    # A finished stage is looked at again all the same: its corpus may have grown, and what is committed costs nothing.
    runs.begin(runs.stage_dir(config, "featurize"), runs.depends_on(config, "featurize"))
    identities = {task: teachers.load(teacher).identity(task) for task, teacher in config.teachers.items()}
    jobs = open_jobs(config, identities)
    missing = [unit for job in jobs for unit in job.missing(retry_failed)]
    total = sum(len(job.corpus.tars) for job in jobs)
    console.print(f"featurize: {total} tars, {total - len(missing)} done, {len(missing)} to do", highlight=False)
    start = time.monotonic()
    reports = list(_execute(config, identities, jobs, missing, console)) if missing else []
    seconds = time.monotonic() - start
    for job in jobs:
        for target in job.sets.values():
            tidy(target, job.corpus.tars)  # of workers that were lost in between
    if unusable := [f"{r.unit.data}/{r.unit.tar}: {r.error}" for r in reports if r.error]:
        more = f" | and {len(unusable) - 10} more" if len(unusable) > 10 else ""
        raise OlaError(f"{len(unusable)} tars could not be featurized: " + " | ".join(unusable[:10]) + more)
    return _summarize(config, jobs, reports, seconds)


def _execute(
    config: PipelineConfig, identities: dict[str, Identity], jobs: list[Job], units: list[Unit], console: Console
) -> Iterator[Report]:
    """Run the units with a progress bar; those another job is at come back at the end, until they are committed."""
    images = {(job.name, tar.name): tar.images for job in jobs for tar in job.corpus.tars}
    progress = Progress(
        TextColumn("featurize"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )
    bar = progress.add_task("", total=sum(images[unit.data, unit.tar] for unit in units), note="")
    start = time.monotonic()
    done, failed, busy_seconds = 0, 0, 0.0
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    with executor(config.teachers, config.featurize, identities, say) as pool, progress:
        while units:
            deferred = []
            for report in pool.run(units):
                if report.busy:
                    deferred.append(report.unit)
                else:
                    progress.advance(bar, images[report.unit.data, report.unit.tar])
                if report.error:
                    say(f"{report.unit.data}/{report.unit.tar}: {report.error}")
                done, failed = done + report.images, failed + len(report.failed)
                busy_seconds += report.forward_seconds
                elapsed = time.monotonic() - start
                share = busy_seconds / elapsed / max(pool.workers, 1)
                workers = f"{pool.workers} of {config.featurize.workers} workers"
                note = f"{done / elapsed:.1f} images/s, {workers}, teachers busy {share:.0%}, {failed} failed"
                progress.update(bar, note=note)
                yield report
            units = deferred
            if units:
                progress.update(bar, note=f"waiting for another job to commit {len(units)} tars")
                time.sleep(POLL)


def _summarize(config: PipelineConfig, jobs: list[Job], reports: list[Report], seconds: float) -> dict[str, Any]:
    """What the stores hold now, and how fast this run was (or the last one that had anything to do)."""
    folder = runs.stage_dir(config, "featurize")
    file = folder / "summary.json"
    computed = sum(report.images for report in reports)
    busy = sum(report.forward_seconds for report in reports) / config.featurize.workers
    speed = {
        "computed_images": computed,
        "seconds": round(seconds, 2),
        "images_per_s": round(computed / max(seconds, 1e-9), 2),
        "teachers_busy": round(busy / max(seconds, 1e-9), 3),
    }
    if not reports and file.exists():
        before = json.loads(file.read_text())
        speed = {key: before[key] for key in speed}
    found = [(job, job.committed()) for job in jobs]
    failures = [failure for job, committed in found for failure in failed_images(job, committed)]
    tasks = {task: [status(job, task, committed) for job, committed in found] for task in config.teachers}
    summary = {
        "images": sum(tar.images for job in jobs for tar in job.corpus.tars),
        "failed": len({(f["data"], f["tar"], f["key"], f["image_index"]) for f in failures}),
        **speed,
        "bytes": sum(s["bytes"] for states in tasks.values() for s in states),
        "bytes_per_image": {
            task: round(sum(s["bytes"] for s in states) / max(1, sum(s["ok"] for s in states)), 1)
            for task, states in tasks.items()
        },
    }
    replace(folder / "failed.jsonl", "".join(json.dumps(f) + "\n" for f in failures).encode())
    replace(file, json.dumps(summary, indent=2).encode())
    runs.finish(folder, summary)
    return summary


def status(job: Job, task: str, committed: dict[str, pa.Table] | None = None) -> dict[str, int]:
    """Counts of one target set: tars committed and in all, images ok, failed and missing, bytes of the targets.

    Args:
        job: the entry.
        task: the set's.
        committed: what `Job.committed` said; listed now if not given.
    """
    tars = job.corpus.tars
    there = summaries(job.sets[task], tars) if committed is None else committed[task]
    done = there["content"].is_valid().to_numpy()
    images = np.array([tar.images for tar in tars], np.int64)
    counts = {name: int(there[name].to_numpy().sum()) for name in ("ok", "failed", "bytes")}
    return {"tars": len(tars), "committed": int(done.sum()), **counts, "missing": int(images[~done].sum())}


def failed_images(job: Job, committed: dict[str, pa.Table] | None = None) -> Iterator[dict[str, Any]]:
    """Every image of the job that was committed without a target, and why; `committed` as of `status`."""
    for task, there in (committed or job.committed()).items():
        target, failed = job.sets[task], there["failed"].to_numpy()
        for tar in (job.corpus.tars[i] for i in np.flatnonzero(failed)):
            commit = target.commit(tar)
            if commit is None:  # withdrawn meanwhile
                continue
            for row in commit.filter(pc.equal(commit["status"], "failed")).to_pylist():
                named = {name: row[name] for name in ("key", "image_index", "reason")}
                yield {"data": job.name, "task": task, "tar": tar.name, **named}
