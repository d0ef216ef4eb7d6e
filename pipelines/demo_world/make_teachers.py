"""``make teachers``: train what is missing, then measure, compare with what ships, and write the card.

Each training runs in a process and one thread of its own, two at a time: small matrices gain nothing from more threads.
A training's folder appears whole, with its record inside, or not at all; so the same command goes on after anything.
"""

import ast
import hashlib
import inspect
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.utils import logging

from olavlm.errors import OlaError
from pipelines.demo_world.build import tell
from pipelines.demo_world.recipe import FULL, JOBS, QUICK, Material, Numbers, Sizes
from pipelines.demo_world.samples import render_samples

SHIPPED = Path(__file__).parent / "weights"
RECORD = "training.json"
AT_ONCE = 2
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Record:
    """What is known of a finished training; lies in its folder as ``training.json``."""

    recipe: str  # hash of everything the result depends on: see `recipe_hash`
    sha256: str  # of model.safetensors
    scenes: int
    steps: int
    seed: int
    cpu_seconds: float  # of the whole job: training, saving, measuring
    wall_seconds: float
    torch: str
    transformers: str
    measured: Numbers  # what only training can measure, as its other half is not kept

    @staticmethod
    def read(folder: Path) -> "Record | None":
        """The record in a folder, if there is one.

        Raises:
            OlaError: it cannot be understood.
        """
        file = folder / RECORD
        try:
            return Record(**json.loads(file.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise OlaError(f"{file}: not a training's record ({error}); remove {folder} to train anew") from None


def make_teachers(out: Path, quick: bool = False, only: Iterable[str] = (), train: bool = True) -> None:
    """Train what `out` lacks, compare it with what ships; arguments and errors as in `train_missing`.

    Args:
        train: otherwise nothing is trained, whatever recipe `out` was made by.
    """
    if train:
        train_missing(out, quick, only)
    if out.resolve() != SHIPPED:
        for name, words in compare(out).items():
            print(f"{name}: {words}")


def train_missing(out: Path, quick: bool = False, only: Iterable[str] = ()) -> None:
    """Train what `out` lacks or holds from another recipe; folders like the hub's, one per job.

    Same sources, sizes and software, same bytes, on one machine; whatever was interrupted before.

    Args:
        out: gets ``depth/``, ``seg/``, ``gen/``, ``student/vision/``, ``student/llm/``, each with a `Record`.
        quick: a few steps each; shows that the recipe runs, not what it can do.
        only: names in `JOBS`; default all.

    Raises:
        OlaError: a training failed; what others finished stays.
    """
    if unknown := sorted(set(only) - set(JOBS)):
        raise OlaError(f"no training is called {', '.join(unknown)}; there are {', '.join(JOBS)}")
    sizes = QUICK if quick else FULL
    missing = [name for name in JOBS if (not only or name in only) and not is_current(out, name, sizes)]
    for name in JOBS:
        if name not in missing and (not only or name in only):
            print(f"{name}: finished before, {out / JOBS[name].folder}", flush=True)
    if missing:
        made_by = {name: recipe_hash(name, sizes) for name in missing}  # of the sources as they are now
        _run(made_by, _material(sizes), sizes, out)


def is_current(out: Path, name: str, sizes: Sizes) -> bool:
    """Whether a job's folder holds what the recipe, as it stands, makes."""
    job = JOBS[name]
    record = Record.read(out / job.folder)
    return (
        record is not None
        and record.recipe == recipe_hash(name, sizes)
        and record.sha256 == sha256(weights_file(out / job.folder))
    )


def recipe_hash(name: str, sizes: Sizes) -> str:
    """Hash over all that a job's result depends on: code without comments, sizes, steps, seed, software.

    The code is that of the job, of the modules it uses, and of all of ours that those import.
    """
    job = JOBS[name]
    depends = {
        "job": _code(inspect.getsource(job.run)),
        **{module: _code(path.read_text()) for module, path in _imported(*_modules(job.run)).items()},
        "sizes": [sizes.train, sizes.judge, sizes.read, sizes.steps[name], job.seed],
        "software": _software(),
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def weights_file(folder: Path) -> Path:
    """The one ``model.safetensors`` of a job's folder."""
    return next(folder.rglob("model.safetensors"), folder / "model.safetensors")


def sha256(file: Path) -> str:
    """Hash of a file's bytes; empty if it is not there."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def compare(out: Path, with_: Path = SHIPPED) -> dict[str, str]:
    """Per job, in words: whether the weights in two folders are the same bytes, or how far they are apart."""
    found = {}
    for name, job in JOBS.items():
        ours, theirs = weights_file(out / job.folder), weights_file(with_ / job.folder)
        if not ours.is_file() or not theirs.is_file():
            found[name] = f"missing in {out if not ours.is_file() else with_}"
        elif sha256(ours) == sha256(theirs):
            found[name] = "equal byte for byte"
        else:
            found[name] = _difference(ours, theirs)
    return found


def _difference(ours: Path, theirs: Path) -> str:
    a, b = load_file(ours), load_file(theirs)
    if {k: v.shape for k, v in a.items()} != {k: v.shape for k, v in b.items()}:
        return "other tensors or shapes"
    apart, name = max((float((a[k].float() - b[k].float()).abs().max()), k) for k in a)
    return f"largest difference {apart:.3g}, in {name}"


def _material(sizes: Sizes) -> Material:
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
                    target=_train, args=(name, made_by[name], material, sizes, out), name=name, daemon=True
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


def _train(name: str, made_by: str, material: Material, sizes: Sizes, out: Path) -> None:
    """One job, in a process of its own: train beside the final folder, rename when all is there."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends this process
    Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
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
        **_software(),
        measured=measured,
    )
    (partial / RECORD).write_text(json.dumps(asdict(record), indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    print(f"{name}: finished, {folder}", flush=True)


def _end_with(parent: Any) -> None:
    """End this process when its parent is gone, however that came to be."""
    parent.join()
    os._exit(1)


def _software() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers")}


def _modules(function: Callable[..., Any]) -> list[str]:
    """Names of the modules that a function's code names."""
    used = (function.__globals__.get(name) for name in function.__code__.co_names)
    return [module.__name__ for module in used if inspect.ismodule(module)]


def _imported(*names: str) -> dict[str, Path]:
    """Files of the named modules and, at any depth, of those of ours that they import at their top."""
    found: dict[str, Path] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        path = ROOT / (name.replace(".", "/") + ".py")
        if name in found or not path.is_file():
            continue
        found[name] = path
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
    return found


def _code(source: str) -> str:
    """Source without comments, layout and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)
