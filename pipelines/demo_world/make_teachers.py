"""``make teachers``: train what is missing, then measure, compare with what ships, and write the card.

Each training runs in a process and one thread of its own, two at a time: small matrices gain nothing from more threads.
A training's folder appears whole, with its record inside, or not at all; so the same command goes on after anything.
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from transformers.utils import logging

from olavlm.errors import OlaError
from pipelines.demo_world.build import tell
from pipelines.demo_world.card import TOLERANCE, model_card, output_table, probe_table
from pipelines.demo_world.gates import Measured, measure
from pipelines.demo_world.recipe import FULL, JOBS, QUICK, Material, Sizes
from pipelines.demo_world.records import (
    RECORD,
    Record,
    compare,
    is_current,
    recipe_hash,
    sha256,
    software,
    weights_file,
)
from pipelines.demo_world.samples import render_samples
from pipelines.demo_world.teacher_sheet import teacher_sheet

SHIPPED = Path(__file__).parent / "weights"
GATES = "gates.json"
AT_ONCE = 2


def make_teachers(out: Path, quick: bool = False, only: Iterable[str] = (), train: bool = True) -> None:
    """Train what `out` lacks, measure all of it, compare it with what ships.

    Writes ``gates.json``, ``teachers.png`` and ``MODEL_CARD.md`` once everything is there.

    Args:
        out: the folder; see `train_missing`.
        quick: a few steps each, judged on fewer scenes; shows that the recipe runs, not what it can do.
        only: train no others; names in `JOBS`.
        train: otherwise nothing is trained, whatever recipe `out` was made by.

    Raises:
        OlaError: a training failed, or the weights do not fit ``demo.yaml``.
    """
    sizes = QUICK if quick else FULL
    if train:
        train_missing(out, sizes, only)
    found = {name: Record.read(out / job.folder) for name, job in JOBS.items()}
    records = {name: record for name, record in found.items() if record}
    if missing := [name for name in JOBS if name not in records]:
        print(f"not there yet: {', '.join(missing)}; all are measured together")
        return
    for name in JOBS:
        if not is_current(out, name, sizes):
            print(f"{name}: made by another recipe than this one")
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    data = render_samples("gates", sizes.judge, workers=AT_ONCE)
    gates = measure(out, data)
    recall = {"gen: R@1 of 256": records["gen"].measured["recall_at_1_of_256"]}
    gates = replace(gates, outputs=gates.outputs | recall)
    (out / GATES).write_text(json.dumps(asdict(gates), indent=2) + "\n")
    teacher_sheet(out / "teachers.png", out, data)
    (out / "MODEL_CARD.md").write_text(model_card(out, records, gates, sizes.judge))
    print(probe_table(gates), output_table(gates), sep="\n\n")
    if out.resolve() != SHIPPED:
        print("\ncompared with what ships:")
        for name, words in compare(out, SHIPPED).items():
            print(f"{name}: {words}")
        print(_compare_gates(gates, SHIPPED / GATES))


def train_missing(out: Path, sizes: Sizes, only: Iterable[str] = ()) -> None:
    """Train what `out` lacks or holds from another recipe; folders like the hub's, one per job.

    Same sources, sizes and software, same bytes, on one machine; whatever was interrupted before.

    Args:
        out: gets ``depth/``, ``seg/``, ``gen/``, ``student/vision/``, ``student/llm/``, each with a `Record`.
        sizes: of the recipe.
        only: names in `JOBS`; default all.

    Raises:
        OlaError: a training failed; what others finished stays.
    """
    if unknown := sorted(set(only) - set(JOBS)):
        raise OlaError(f"no training is called {', '.join(unknown)}; there are {', '.join(JOBS)}")
    missing = [name for name in JOBS if (not only or name in only) and not is_current(out, name, sizes)]
    for name in JOBS:
        if name not in missing and (not only or name in only):
            print(f"{name}: finished before, {out / JOBS[name].folder}", flush=True)
    if missing:
        made_by = {name: recipe_hash(name, sizes) for name in missing}  # of the sources as they are now
        _run(made_by, render_material(sizes), sizes, out)


def render_material(sizes: Sizes) -> Material:
    """What all jobs are given."""
    start = time.monotonic()
    print(f"rendering {sizes.train + sizes.judge + sizes.read} scenes", flush=True)
    told = [t for chunk in tell("teachers", sizes.read, 0, AT_ONCE) for t in chunk]
    material = Material(
        render_samples("teachers", sizes.train, workers=AT_ONCE),
        render_samples("gates", sizes.judge, workers=AT_ONCE),
        told,
    )
    print(f"rendered in {time.monotonic() - start:.0f} s", flush=True)
    return material


def _run(made_by: dict[str, str], material: Material, sizes: Sizes, out: Path) -> None:
    """`AT_ONCE` processes at a time until all is done; none outlives this function or this process."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes when they start: BLAS would take every core
    context = get_context("spawn")
    waiting, failed = list(made_by), list[str]()
    running: list[SpawnProcess] = []
    try:
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                name = waiting.pop(0)
                process = context.Process(
                    target=_process, args=(name, made_by[name], material, sizes, out), name=name, daemon=True
                )
                process.start()
                running.append(process)
            wait([process.sentinel for process in running])
            failed += [p.name for p in running if p.exitcode]
            running = [p for p in running if p.exitcode is None]
    finally:
        for process in running:
            process.kill()
            process.join()
    if failed:
        raise OlaError(f"training failed: {', '.join(failed)} (reason above); the others are in {out}")


def _process(name: str, made_by: str, material: Material, sizes: Sizes, out: Path) -> None:
    """`run_job` in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends this process
    Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    run_job(name, made_by, material, sizes, out)
    print(f"{name}: finished, {out / JOBS[name].folder}", flush=True)


def run_job(name: str, made_by: str, material: Material, sizes: Sizes, out: Path) -> None:
    """One job in this process: train beside the final folder, rename when all is there.

    Args:
        name: in `JOBS`.
        made_by: its `recipe_hash`, taken before `material` was rendered: sources may change meanwhile.
        material: what it is given.
        sizes: of the recipe.
        out: where its folder goes; one that is there is replaced.
    """
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    job, start, cpu = JOBS[name], time.monotonic(), time.process_time()
    folder = out / job.folder
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    measured = job.run(material, sizes.steps[name], job.seed, partial)
    record = Record(
        recipe=made_by,
        sha256=sha256(weights_file(partial)),
        scenes=sizes.read if name == "llm" else sizes.train,
        steps=sizes.steps[name],
        seed=job.seed,
        cpu_seconds=round(time.process_time() - cpu, 1),
        wall_seconds=round(time.monotonic() - start, 1),
        **software(),
        measured=measured,
    )
    (partial / RECORD).write_text(json.dumps(asdict(record), indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _end_with(parent: Any) -> None:
    """End this process when its parent is gone, however that came to be."""
    parent.join()
    os._exit(1)


def _compare_gates(gates: Measured, shipped: Path) -> str:
    if not shipped.is_file():
        return f"gates: {shipped} is missing"
    theirs = Measured(**json.loads(shipped.read_text()))
    apart = {name: abs(value - theirs.outputs.get(name, float("nan"))) for name, value in gates.outputs.items()}
    for name, found in gates.probes.items():
        apart |= {f"{name}, {s}": abs(v - theirs.probes.get(name, {}).get(s, float("nan"))) for s, v in found.items()}
    beyond = [f"{name} {by:.3f}" for name, by in apart.items() if not by <= TOLERANCE]
    return f"gates: {f'differ by more than {TOLERANCE}: ' + '; '.join(beyond) if beyond else f'all within {TOLERANCE}'}"
