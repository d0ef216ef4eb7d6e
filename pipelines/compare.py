"""Runs side by side in one self-contained page: what differs in them, and whether it made a difference.

A run is a folder of stages, whoever made it: ``runs/demo``, a setting of a sweep, an arm of a study. The first run is
what the others are compared with: question by question, image by image.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from markupsafe import Markup
from omegaconf import OmegaConf

from olavlm import runs
from olavlm.data import atomic
from olavlm.errors import OlaError
from olavlm.eval.benchmarks import BENCHMARKS
from olavlm.eval.bootstrap import Estimate
from olavlm.eval.cv_bench import Question
from pipelines import figures
from pipelines.beside import STAGES, layers
from pipelines.intervals import paired, paired_mean, wilson
from pipelines.page import render
from pipelines.replies import outcome
from pipelines.results import duration, read_json, read_lines, read_replies
from pipelines.see import READ

TITLES = {"pretrain": "Pretraining", "vpt": "Visual pretraining", "finetune": "Fine-tuning"}


@dataclass(frozen=True)
class Run:
    """A run's folder, and what to call it beside the others."""

    name: str
    folder: Path

    def json(self, file: str) -> dict[str, Any]:
        """A file of a stage, {} if it is not there."""
        return read_json(self.folder / file)


def compare(folders: Sequence[Path], out: Path | None = None, images: Sequence[str] = ()) -> Path:
    """Write a page about these runs; what none of them has is left out or said to be missing.

    Args:
        folders: two runs or more; the others are compared with the first.
        out: the page; default: ``compare.html`` in the deepest folder that holds all of them.
        images: keys of the samples whose images are shown as the layers see them, in the first run's held-out data or
            else in what it was trained on; default: some, evenly spread.

    Returns:
        The page's path.

    Raises:
        OlaError: fewer than two runs, one given twice, a folder that is no run, no image of such a key.
    """
    found = open_runs(folders)
    seen, seen_missing = layers({run.name: run.folder for run in found}, images)
    probe = _merged(found, "probe/probe.json", "floor")
    probe_tasks = _merged(found, "probe_tasks/probe_tasks.json", "reference", "measures")
    held_out: list[int] = [run.json("probe/probe.json").get("held_out", 0) for run in found]
    page = render(
        "compare.html.j2",
        names=[run.name for run in found],
        differences=_differences(found),
        stages=_stages(found),
        losses=list(_losses(found)),
        probe=Markup(figures.probe_curves(probe, {})) if probe["students"] else None,
        probe_gains=_probe_gains(found),
        held_out=max(held_out),
        probe_tasks=Markup(figures.probe_task_curves(probe_tasks)) if probe_tasks["measures"] else None,
        benchmarks=[_benchmark(key, found) for key in BENCHMARKS if any(_scores(run, key) for run in found)],
        layers=seen,
        layers_missing=seen_missing,
        read=READ,
    )
    path = out or Path(os.path.commonpath([run.folder.absolute() for run in found])) / "compare.html"
    atomic.replace(path, page.encode())
    return path


def open_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, each called by what tells it from the others.

    Raises:
        OlaError: as `compare`.
    """
    if len(folders) < 2:
        raise OlaError(f"compare: {len(folders)} run; expected two or more, e.g. runs/demo runs/other")
    for i, folder in enumerate(folders):
        if not any(folder.glob("*/config.yaml")):
            raise OlaError(f"{folder}: no run here, no stage has a config.yaml; expected a folder such as runs/demo")
        if folder.resolve() in [other.resolve() for other in folders[:i]]:
            raise OlaError(f"{folder}: given twice; expected different runs")
    common = os.path.commonpath([folder.absolute() for folder in folders])
    names = [os.path.relpath(folder.absolute(), common) for folder in folders]
    names = [Path(common).name if name == "." else name for name in names]
    return [Run(name, folder) for name, folder in zip(names, folders, strict=True)]


def _differences(found: Sequence[Run]) -> dict[str, list[str]]:
    """By key of the configuration each run's value, for keys in which they differ."""
    settings = [_settings(run) for run in found]
    keys = dict.fromkeys(key for of in settings for key in of)
    rows = {key: [_plain(of[key]) if key in of else "–" for of in settings] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _settings(run: Run) -> dict[str, Any]:
    """What a run's stages were configured with, by key; corpora and stores by what is in them, not where they lie."""
    settings: dict[str, Any] = {}
    for stage in ("corpus", "featurize", *STAGES, "probe", "evaluate"):
        file = run.folder / stage / "config.yaml"
        if file.is_file():
            stated: Any = OmegaConf.to_container(OmegaConf.load(file))
            own = runs.flat({key: of for key, of in stated.items() if key not in ("trained", "benchmark")})
            places = tuple(f"eval.{key}" for key in BENCHMARKS)
            settings |= {k: v for k, v in own.items() if not k.endswith((".corpus", ".targets")) and k not in places}
        for name, pinned in run.json(f"{stage}/snapshot.json").get("data", {}).items():
            settings |= {f"data.{name}.corpus": pinned["corpus_id"][:12]}
            settings |= {f"data.{name}.targets": ", ".join(pinned["targets"].values())} if pinned["targets"] else {}
    return settings


def _plain(value: Any) -> str:
    return "" if value is None else str(value)


def _stages(found: Sequence[Run]) -> dict[str, list[str]]:
    """By stage each run's computing time, as far as it has finished."""
    rows = {}
    for stage in ("corpus", "featurize", *STAGES, "probe", "probe_tasks", "evaluate"):
        done = [run.json(f"{stage}/done.json") for run in found]
        if any(done):
            rows[stage] = [duration(of["seconds"]) if of else "–" for of in done]
    return rows


def _losses(found: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """By training stage the runs' losses in one figure."""
    for stage in STAGES:
        lines = {run.name: read_lines(run.folder / stage / "metrics.jsonl") for run in found}
        if logged := {name: of for name, of in lines.items() if of}:
            figure = figures.losses_overlaid(logged, TITLES[stage])
            yield {"title": TITLES[stage], "figure": Markup(figure), "runs": list(logged)}


def _merged(found: Sequence[Run], file: str, *shared: str) -> dict[str, Any]:
    """The last student of every run's file, called by the run; of the first run also `initial`, and what is shared."""
    merged: dict[str, Any] = {"students": {}, **{key: {} for key in shared}}
    for run in found:
        stored = run.json(file)
        students = dict(stored.get("students", {}))
        for key in shared:
            merged[key] = stored.get(key, {}) | merged[key]
        if "initial" in students and "initial" not in merged["students"]:
            merged["students"]["initial"] = students["initial"]
        if trained := [name for name in students if name != "initial"]:
            merged["students"][run.name] = students[trained[-1]]
    return merged


def _probe_gains(found: Sequence[Run]) -> dict[str, dict[str, Estimate]]:
    """By run and task how much closer its probes come than the first run's, on the same held-out images."""
    first, *others = ((run, _cosines(run)) for run in found)
    gains: dict[str, dict[str, Estimate]] = {}
    for run, cosines in others:
        tasks = {task: of for task, of in cosines.items() if of.keys() & first[1].get(task, {}).keys()}
        gains |= {run.name: {task: paired_mean(first[1][task], of) for task, of in tasks.items()}} if tasks else {}
    return gains


def _cosines(run: Run) -> dict[str, dict[str, float]]:
    """By task and image of a run's last student the mean cosine over the layers."""
    file = run.folder / "probe" / "cosines.parquet"
    students = [name for name in run.json("probe/probe.json").get("students", {}) if name != "initial"]
    if not file.is_file() or not students:
        return {}
    table = pq.read_table(file, filters=[("student", "=", students[-1])])
    means = table.group_by(["task", "key"]).aggregate([("cosine", "mean")])
    cosines: dict[str, dict[str, float]] = defaultdict(dict)
    for row in means.to_pylist():
        cosines[row["task"]][row["key"]] = row["cosine_mean"]
    return cosines


def _scores(run: Run, key: str) -> dict[str, Any]:
    return run.json(f"evaluate/{key}/scores.json")


def _benchmark(key: str, found: Sequence[Run]) -> dict[str, Any]:
    """A benchmark's figure, every run's accuracies, and what each gains over the first run on the same questions."""
    benchmark = BENCHMARKS[key]
    scored = {run.name: _scores(run, key) for run in found if _scores(run, key)}
    intervals = {name: {row: wilson(cell) for row, cell in of["scores"].items() if cell} for name, of in scored.items()}
    baselines = next(iter(scored.values()))["baselines"]
    first, *others = ((run.name, read_replies(run.folder / "evaluate" / key)) for run in found if run.name in scored)
    gains: dict[str, dict[str, Estimate]] = {}
    unpaired = []
    for name, lines in others:
        questions = _same_questions(first[1], lines)
        if questions is None:
            unpaired.append(name)
            continue
        right = [{line["id"]: outcome(line) == "right" for line in of} for of in (first[1], lines)]
        gains[name] = paired(benchmark, questions, *right)
    rows = [row for row in (*benchmark.rows, *benchmark.details) if any(row in of for of in intervals.values())]
    return {
        "title": benchmark.title,
        "figure": Markup(figures.score_dots(benchmark.title, intervals, baselines, benchmark.rows)),
        "rows": rows,
        "intervals": intervals,
        "gains": gains,
        "first": first[0],
        "unpaired": unpaired,
        "baselines": baselines,
        "aggregation": benchmark.aggregation,
    }


def _same_questions(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> list[Question] | None:
    """The questions that both were asked; None if there is none, or another one under the same id."""
    asked = {line["id"]: line for line in first}
    both = [line for line in second if line["id"] in asked]
    same = ("task", "source", "question", "choices", "answer")
    if not both or any(line[part] != asked[line["id"]][part] for line in both for part in same):
        return None
    return [
        Question(line["id"], line["task"], line["source"], b"", line["question"], tuple(line["choices"]), "", "")
        for line in both
    ]
