"""``python -m pipelines study``: train what is missing, then say what has been found so far."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from olavlm import runs
from olavlm.config import PipelineConfig
from olavlm.data.atomic import replace
from olavlm.eval import cv_bench
from olavlm.eval.bootstrap import Estimate
from olavlm.provenance import provenance
from pipelines.results import read_json
from pipelines.settings import Setting, run_all
from pipelines.study.analysis import Array, Asked, accuracies, gains, stack_cosines, two_way
from pipelines.study.page import draw, write
from pipelines.study.protocol import Part, Protocol, open_study, probes, settings

#: Arm and seed.
Key = tuple[str, int]


def study(file: Path, overrides: list[str], jobs: int) -> int:
    """Train and ask every student of a protocol, then write ``study.json``, ``study.md`` and ``study.png``.

    Stopped and started again, it does what is missing. What is not finished is left out of the answers, seed by seed:
    all arms of a part have the same seeds.

    Args:
        file: the protocol.
        overrides: ``key.path=value`` strings that hold for all students.
        jobs: students at the same time.

    Returns:
        An exit code, as of `pipelines.settings.run_all`.

    Raises:
        OlaError: a protocol or pipeline that is not valid, before anything runs.
    """
    protocol, base = open_study(file, overrides)
    students = settings(protocol, base, overrides)
    console = Console()
    code, failed = run_all(base, protocol.pipeline, overrides, list(students.values()), jobs)
    probed = probes(protocol, base, overrides, students)
    if code != 130:
        ready = [
            setting
            for seed, (_, setting) in probed.items()
            if all(_finished(students[arm, seed]) for arm in protocol.probes)
        ]
        probing, also = run_all(base, protocol.pipeline, overrides, ready, jobs) if ready else (0, {})
        code, failed = code or probing, failed | also
    for name, stage in failed.items():
        console.print(f"[red]failed:[/red] {name}, in {stage}; the same command tries again")
    if any(_finished(setting) for setting in students.values()):
        folder = Path(base.run_dir)
        found = collect(protocol, base, students) | {"probes": _probes(protocol, probed)}
        replace(folder / "study.json", json.dumps(found, indent=1, default=asdict).encode())
        replace(folder / "study.png", draw(protocol, found))
        replace(folder / "study.md", write(protocol, found).encode())
        console.print(str(folder / "study.md"))
    return code


def collect(protocol: Protocol, base: PipelineConfig, students: dict[Key, Setting]) -> dict[str, Any]:
    """What the finished students answered: per part the accuracies of its arms and the gains of its pairs."""
    assert base.eval is not None
    assert base.eval.cv_bench is not None
    asked = Asked.of(cv_bench.load(base.eval.cv_bench, base.eval.limit))
    first = next(setting for setting in students.values() if _finished(setting))
    baselines = read_json(_evaluated(first) / "scores.json")["baselines"]
    return {
        "questions": {name: sum(task in tasks for task in asked.tasks) for name, tasks in protocol.groups.items()},
        "baselines": {
            name: {group: _expected(asked, rows, tasks) for group, tasks in protocol.groups.items()}
            for name, rows in baselines.items()
        },
        "parts": [_answer(part, protocol, asked, students) for part in protocol.parts],
        "seconds": {
            stage: [
                done["seconds"] for s in students.values() if (done := runs.finished(runs.stage_dir(s.config, stage)))
            ]
            for stage in ("pretrain", "finetune", "evaluate")
        },
        **provenance(),
    }


def _answer(part: Part, protocol: Protocol, asked: Asked, students: dict[Key, Setting]) -> dict[str, Any]:
    """One part's numbers, of the seeds of which all its arms are finished."""
    seeds = [seed for seed in part.seeds if all(_finished(students[arm, seed]) for arm in part.arms)]
    answered: dict[str, Any] = {"question": part.question, "seeds": seeds, "planned": part.seeds}
    if len(seeds) < 2:
        return answered | {"accuracy": {}, "gains": []}
    right = {arm: asked.stack(_evaluated(students[arm, seed]) / "replies.jsonl" for seed in seeds) for arm in part.arms}
    return answered | {
        "accuracy": accuracies(right, asked, protocol.groups),
        "gains": [
            {"arm": arm, "to": other, **of_pair}
            for (arm, other), of_pair in gains(right, asked, protocol.groups, part.pairs).items()
        ],
    }


def _probes(protocol: Protocol, probed: dict[int, tuple[dict[str, str], Setting]]) -> dict[str, Any]:
    """Task → layer → arm → cosine, and gain on the first arm, over seeds and held-out images."""
    folders = {seed: runs.stage_dir(setting.config, "probe") for seed, (_, setting) in probed.items()}
    done = [seed for seed, folder in folders.items() if runs.finished(folder)]
    if not done:
        return {}
    cosines = stack_cosines([(probed[seed][0], folders[seed] / "cosines.parquet") for seed in done])
    first = protocol.probes[0]
    return {
        task: {
            layer: {
                arm: {"cosine": _mean(of_arm[arm]), "gain": _mean(of_arm[arm] - of_arm[first])}
                for arm in protocol.probes
            }
            for layer, of_arm in of_task.items()
        }
        for task, of_task in cosines.items()
    }


def _mean(cosines: Array) -> Estimate:
    """Of (seeds, images)."""
    return two_way(cosines, np.arange(cosines.shape[1]))


def _expected(asked: Asked, rows: dict[str, float], tasks: list[str]) -> float:
    """A baseline's accuracy over a group, from that over its tasks."""
    counts = [(asked.tasks == task).sum() for task in tasks]
    return float(sum(rows[task] * count for task, count in zip(tasks, counts, strict=True)) / sum(counts))


def _finished(setting: Setting) -> bool:
    return runs.finished(runs.stage_dir(setting.config, "evaluate")) is not None


def _evaluated(setting: Setting) -> Path:
    return runs.stage_dir(setting.config, "evaluate") / "cv_bench"
