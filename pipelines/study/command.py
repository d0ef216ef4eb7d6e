"""``python -m pipelines study``: train what is missing, then say what has been found so far."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from rich.console import Console

from olavlm import runs
from olavlm.config import PipelineConfig
from olavlm.data.atomic import replace
from olavlm.eval import cv_bench
from olavlm.eval.bootstrap import Estimate
from olavlm.provenance import provenance
from pipelines.results import read_json, read_lines
from pipelines.settings import Setting, run_all
from pipelines.study.analysis import Array, Asked, Replies, by_group, detectable, interval, stack_cosines
from pipelines.study.page import draw_accuracies, draw_gains, write
from pipelines.study.protocol import Pair, Part, Protocol, open_study, pin, probes, settings

#: Arm and seed.
Key = tuple[str, int]

#: By arm and seed.
Answers = dict[Key, Replies]


def study(file: Path, overrides: list[str], jobs: int) -> int:
    """Train and ask every student of a protocol, then write ``study.json``, ``study.md`` and its figures.

    Stopped and started again, it does what is missing. What is not finished is left out of the answers: a pair is
    compared by the seeds that both arms have.

    Args:
        file: the protocol.
        overrides: ``key.path=value`` strings that hold for all students.
        jobs: students at the same time.

    Returns:
        An exit code, as of `pipelines.settings.run_all`.

    Raises:
        OlaError: a protocol or pipeline that is not valid, or another protocol than before; before anything runs.
    """
    protocol, base = open_study(file, overrides)
    students = settings(protocol, base, overrides)
    probed = probes(protocol, base, overrides, students)
    folder = Path(base.run_dir)
    pin(protocol, folder)
    console = Console()
    code, failed = run_all(base, protocol.pipeline, overrides, list(students.values()), jobs)
    ready = [
        setting
        for seed, (_, setting) in probed.items()
        if all(_finished(students[arm, seed]) for arm in protocol.probes)
    ]
    if ready and code != 130:
        probing, also = run_all(base, protocol.pipeline, overrides, ready, jobs)
        code, failed = code or probing, failed | also
    for name, stage in failed.items():
        console.print(f"[red]failed:[/red] {name}, in {stage}; the same command tries again")
    if any(_finished(setting) for setting in students.values()):
        found = collect(protocol, base, students) | {"overrides": overrides, "probes": _probes(protocol, probed)}
        replace(folder / "study.json", json.dumps(found, indent=1, default=asdict).encode())
        replace(folder / "study.png", draw_gains(protocol, found))
        replace(folder / "accuracy.png", draw_accuracies(protocol, found))
        replace(folder / "study.md", write(protocol, found).encode())
        console.print(str(folder / "study.md"))
    return code


def collect(protocol: Protocol, base: PipelineConfig, students: dict[Key, Setting]) -> dict[str, Any]:
    """What the finished students answered: per part the accuracies of its arms and the gains of its pairs."""
    assert base.eval is not None
    assert base.eval.cv_bench is not None
    asked = Asked.of(cv_bench.load(base.eval.cv_bench, base.eval.limit))
    finished = {key: setting for key, setting in students.items() if _finished(setting)}
    answers = {key: asked.read(_evaluated(setting) / "replies.jsonl") for key, setting in finished.items()}
    baselines = read_json(_evaluated(next(iter(finished.values()))) / "scores.json")["baselines"]
    parts = [_answer(part, protocol, asked, answers) for part in protocol.parts]
    gains = {(gain["arm"], gain["to"]): gain for gain in parts[0]["gains"]}
    return {
        "questions": {name: sum(task in tasks for task in asked.tasks) for name, tasks in protocol.groups.items()},
        "baselines": {
            name: {group: _expected(asked, rows, tasks) for group, tasks in protocol.groups.items()}
            for name, rows in baselines.items()
        },
        "primary": [gains[pair] for pair in protocol.primary.pairs],
        "parts": parts,
        "words": _words(protocol.parts[0], asked, answers),
        "students": [_told(key, setting) for key, setting in finished.items()],
        **provenance(),
    }


def _answer(part: Part, protocol: Protocol, asked: Asked, answers: Answers) -> dict[str, Any]:
    """One part's numbers: of an arm over the seeds that are finished, of a pair over those that both have."""
    accuracy = {}
    for arm in part.arms:
        of_arm = [answers[arm, seed].right for seed in part.seeds if (arm, seed) in answers]
        if len(of_arm) > 1:
            found = by_group(np.stack(of_arm), asked, protocol.groups)
            accuracy[arm] = {name: Estimate(e.value, max(e.low, 0), min(e.high, 1)) for name, e in found.items()}
    return {
        "question": part.question,
        "planned": part.seeds,
        "accuracy": accuracy,
        "gains": [_gain(pair, part, protocol, asked, answers) for pair in part.pairs],
    }


def _gain(pair: Pair, part: Part, protocol: Protocol, asked: Asked, answers: Answers) -> dict[str, Any]:
    """How much more often the first arm is right, seed by seed and question by question."""
    arm, other = pair
    gains = {
        seed: answers[arm, seed].right - answers[other, seed].right
        for seed in part.seeds
        if (arm, seed) in answers and (other, seed) in answers
    }
    told: dict[str, Any] = {"arm": arm, "to": other, "seeds": [*gains], "by_seed": {}, "groups": {}}
    if len(gains) > 1:
        values = np.stack([*gains.values()])
        asks = {name: np.isin(asked.tasks, tasks) for name, tasks in protocol.groups.items()}
        told["by_seed"] = {name: values[:, here].mean(1).tolist() for name, here in asks.items()}
        told["groups"] = by_group(values, asked, protocol.groups)
        decides = asks[protocol.primary.group]
        told["detectable"] = detectable(values[:, decides], asked.images[decides])
    return told


def _words(part: Part, asked: Asked, answers: Answers) -> dict[str, dict[str, dict[str, float]]]:
    """Arm → task → how often the words before the letter name the right choice, and how often the letter fits them."""
    found = {}
    for arm in part.arms:
        of_arm = [answers[arm, seed] for seed in part.seeds if (arm, seed) in answers]
        if of_arm:
            named, fits = (np.stack([getattr(one, of) for one in of_arm]) for of in ("named", "fits"))
            found[arm] = {
                str(task): {"named": float(named[:, here].mean()), "fits": float(fits[:, here].mean())}
                for task in dict.fromkeys(asked.tasks)
                for here in [asked.tasks == task]
            }
    return found


def _told(key: Key, setting: Setting) -> dict[str, Any]:
    """What a student was trained with, by which commit, and how many of its replies name an option."""
    stages = {stage: runs.finished(runs.stage_dir(setting.config, stage)) or {} for stage in setting.config.stages}
    return {
        "arm": key[0],
        "seed": key[1],
        "stages": {
            stage: {name: done[name] for name in ("steps", "samples", "seconds")}
            | {"losses": _losses(runs.stage_dir(setting.config, stage), done["final"])}
            for stage, done in stages.items()
        },
        "commits": sorted({str(done["provenance"]["commit"]) for done in stages.values()}),
        "answered": read_json(_evaluated(setting) / "scores.json")["scores"]["micro"]["answered"],
    }


def _losses(folder: Path, names: Iterable[str]) -> dict[str, float]:
    """Means over the last quarter of the steps that a stage has logged; a single step is a single batch."""
    lines = read_lines(folder / "metrics.jsonl")
    last = lines[-max(len(lines) // 4, 1) :]
    return {name: fmean(line[name] for line in last) for name in names}


def _probes(protocol: Protocol, probed: dict[int, tuple[dict[str, str], Setting]]) -> dict[str, Any]:
    """Task → layer → cosine by arm, and gains of the first part's pairs, over seeds and held-out images."""
    folders = {seed: runs.stage_dir(setting.config, "probe") for seed, (_, setting) in probed.items()}
    done = [seed for seed, folder in folders.items() if runs.finished(folder)]
    if len(done) < 2:
        return {}
    cosines = stack_cosines([(probed[seed][0], folders[seed] / "cosines.parquet") for seed in done])
    pairs = [pair for pair in protocol.parts[0].pairs if {*pair} <= {*protocol.probes}]
    floor = read_json(folders[done[0]] / "probe.json")["floor"]
    return {
        task: {
            "floor": floor[task]["value"],
            "images": next(iter(of_task[min(of_task)].values())).shape[1],
            "layers": {
                layer: {
                    "cosine": {arm: _mean(of_arm[arm]) for arm in protocol.probes},
                    "gains": [{"arm": arm, "to": to, "gain": _mean(of_arm[arm] - of_arm[to])} for arm, to in pairs],
                }
                for layer, of_arm in of_task.items()
            },
        }
        for task, of_task in cosines.items()
    }


def _mean(cosines: Array) -> Estimate:
    """Of (seeds, images)."""
    return interval(cosines, np.arange(cosines.shape[1]))


def _expected(asked: Asked, rows: dict[str, float], tasks: list[str]) -> float:
    """A baseline's accuracy over a group, from that over its tasks."""
    counts = [(asked.tasks == task).sum() for task in tasks]
    return float(sum(rows[task] * count for task, count in zip(tasks, counts, strict=True)) / sum(counts))


def _finished(setting: Setting) -> bool:
    return runs.finished(runs.stage_dir(setting.config, "evaluate")) is not None


def _evaluated(setting: Setting) -> Path:
    return runs.stage_dir(setting.config, "evaluate") / "cv_bench"
