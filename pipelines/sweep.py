"""Many settings from one corpus and one store, one table: what a feature computed once is good for.

Every combination of the swept values is a run of its own in ``runs/<pipeline>/sweep/<setting>/``; more may be added.
"""

import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from olavlm import runs
from olavlm.config import PipelineConfig, load_pipeline
from olavlm.data.atomic import replace
from olavlm.errors import OlaError
from olavlm.eval.benchmarks import BENCHMARKS
from pipelines.results import read_json
from pipelines.settings import Setting, make_setting, run_all

Axes = list[tuple[str, list[str]]]  # key and its values, as YAML
Values = dict[str, str]  # key → value, as YAML
Metrics = dict[str, float]


def sweep(pipeline: str, overrides: list[str], axes: Axes, jobs: int = 1) -> int:
    """Train, probe and evaluate every setting; write ``sweep/sweep.json`` and print the table.

    Args:
        pipeline: name or path of the pipeline.
        overrides: ``key.path=value`` strings that hold for all settings.
        axes: keys and the values each of them takes. Settings that differ in `seed` alone share a row of the table.
        jobs: settings at the same time.

    Returns:
        0; 1 if a setting failed, after all others have been tried; 130 after Ctrl-C.

    Raises:
        OlaError: a value that does not validate (before anything runs), or a key of what is featurized.
    """
    base = load_pipeline(pipeline, overrides)
    chosen = list(settings(base, pipeline, overrides, axes))
    console = Console()
    code, failed = run_all(base, pipeline, overrides, [setting for _, setting in chosen], jobs)
    if code and not failed:
        return code
    rows = collect(chosen)
    replace(_folder(base) / "sweep.json", json.dumps({"settings": rows, "failed": failed}, indent=2).encode())
    show(rows, console)
    for name, stage in failed.items():
        console.print(f"[red]failed:[/red] {escape(name)}, in {stage}; the same command tries again")
    return code


def settings(base: PipelineConfig, pipeline: str, overrides: list[str], axes: Axes) -> Iterator[tuple[Values, Setting]]:
    """Every combination of the axes' values, and the setting of `base` that it makes.

    Raises:
        OlaError: an axis without values or given twice, a key under `data` or `teachers` (another store would be
            needed), a value that does not validate.
    """
    keys = [key for key, _ in axes]
    for key, values in axes:
        if not values or keys.count(key) > 1:
            raise OlaError(f"--over {key}: expected a key, once, and the values it takes; e.g. --over seed 0 1 2")
        if key.split(".")[0] in ("data", "teachers", "run_dir", "name"):
            raise OlaError(f"--over {key}: not to be swept; all settings share one corpus and one store")
    for combination in itertools.product(*(values for _, values in axes)):
        chosen = dict(zip(keys, combination, strict=True))
        own = [f"{key}={value}" for key, value in chosen.items()]
        yield chosen, make_setting(base, pipeline, overrides, _name(chosen), own, _folder(base))


def collect(chosen: list[tuple[Values, Setting]]) -> list[dict[str, Any]]:
    """One row per setting, those of several seeds joined: `values`, `seeds`, `mean` and `stderr` by metric.

    The standard error is that over seeds where there are several, else the benchmark's own where it has one.
    """
    groups: dict[str, list[PipelineConfig]] = {}
    swept: dict[str, Values] = {}
    for values, setting in chosen:
        own = {key: value for key, value in values.items() if key != "seed"}
        groups.setdefault(_name(own), []).append(setting.config)
        swept[_name(own)] = own
    rows = []
    for name, group in groups.items():
        found = [pair for pair in map(_metrics, group) if pair[0]]
        means: Metrics = {}
        errors: Metrics = {}
        for metric in dict.fromkeys(metric for metrics, _ in found for metric in metrics):
            numbers = [metrics[metric] for metrics, _ in found if metric in metrics]
            means[metric] = fmean(numbers)
            if len(numbers) > 1:
                errors[metric] = stdev(numbers) / math.sqrt(len(numbers))
            elif error := found[0][1].get(metric):
                errors[metric] = error
        rows.append({"values": swept[name], "seeds": len(found), "mean": means, "stderr": errors})
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """The rows as columns, one line per metric that any of them has; in several tables where one would be too wide."""
    metrics = list(dict.fromkeys(name for row in rows for name in row["mean"]))
    names = [escape(_name(row["values"])) or "as it is" for row in rows]
    beside = max(1, (console.width - 22) // (max(map(len, [*names, "0.000 ± 0.000"])) + 3))
    for start in range(0, len(rows), beside):
        some = rows[start : start + beside]
        table = Table("setting", *names[start : start + beside])
        table.add_row("seeds", *(str(row["seeds"]) for row in some))
        for name in metrics:
            table.add_row(name, *(_cell(row["mean"].get(name), row["stderr"].get(name)) for row in some))
        console.print(table)


def _cell(mean: float | None, error: float | None) -> str:
    if mean is None:
        return "–"
    return f"{mean:.3f}" if error is None else f"{mean:.3f} ± {error:.3f}"


def _metrics(config: PipelineConfig) -> tuple[Metrics, Metrics]:
    """What a setting's finished stages say, and the standard errors of what has one."""
    values, errors = Metrics(), Metrics()
    for stage in config.stages:
        final = (runs.finished(runs.stage_dir(config, stage)) or {}).get("final", {})
        values |= {f"{stage} {key}": value for key, value in final.items() if key in ("loss", "text")}
    probed = read_json(runs.stage_dir(config, "probe") / "probe.json").get("students", {})
    if config.probe and (last := probed.get(config.probe.students[-1])):
        values |= {f"probe {task}": fmean(cell["value"] for cell in of.values()) for task, of in last.items()}
    for key, benchmark in BENCHMARKS.items():
        scores = read_json(runs.stage_dir(config, "evaluate") / key / "scores.json").get("scores", {})
        for row in benchmark.rows:
            if cell := scores.get(row):
                name = f"{benchmark.title} {row}"
                values[name], errors[name] = cell["accuracy"], cell["stderr"]
    return values, errors


def _folder(base: PipelineConfig) -> Path:
    return Path(base.run_dir) / "sweep"


def _name(values: dict[str, str]) -> str:
    """``contrastive=0.3,seed=1``; whole keys where their last parts are the same."""
    lasts = [key.rpartition(".")[2] for key in values]
    short = lasts if len(set(lasts)) == len(lasts) else list(values)
    return re.sub(r"[^\w.,=\[\]{}:-]+", "", ",".join(f"{k}={v}" for k, v in zip(short, values.values(), strict=True)))
