"""Many settings from one corpus and one store, one table: what a feature computed once is good for.

Every combination of the swept values is a run of its own in ``runs/<pipeline>/sweep/<setting>/``. Corpora, targets and
benchmark are the pipeline's own and are never made again. A stage that two settings have in common is trained once: in
the second it is a link to the first. Stopped and started again, a sweep does what is still missing; more settings may
be added.
"""

import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from olavlm import runs
from olavlm.config import PipelineConfig, load_pipeline
from olavlm.data.atomic import replace
from olavlm.errors import OlaError
from olavlm.eval.benchmarks import BENCHMARKS
from pipelines import runner
from pipelines.results import read_json

Axes = list[tuple[str, list[str]]]  # key and its values, as YAML
Metrics = dict[str, float]


@dataclass(frozen=True)
class Setting:
    """One combination of the swept values."""

    values: dict[str, str]  # key → value, as YAML
    config: PipelineConfig
    overrides: list[str]  # that make `config` of the pipeline's file

    @property
    def name(self) -> str:
        """Its folder: the last part of every key, and the value."""
        return _name(self.values)


def sweep(pipeline: str, overrides: list[str], axes: Axes) -> int:
    """Train, probe and evaluate every setting; write ``sweep/sweep.json`` and print the table.

    Args:
        pipeline: name or path of the pipeline.
        overrides: ``key.path=value`` strings that hold for all settings.
        axes: keys and the values each of them takes. Settings that differ in `seed` alone share a row of the table.

    Returns:
        0; 1 if a setting failed, after all others have been tried; 130 after Ctrl-C.

    Raises:
        OlaError: a value that does not validate (before anything runs), or a key of what is featurized.
    """
    base = load_pipeline(pipeline, overrides)
    chosen = list(settings(base, pipeline, overrides, axes))
    console = Console()
    for stage in ("corpus", "featurize"):
        if stage in runs.stages_of(base) and (code := _run(base, stage, pipeline, overrides)):
            return code
    failed: dict[str, str] = {}
    for number, setting in enumerate(chosen, 1):
        console.print(f"[bold]setting {number}/{len(chosen)}: {escape(setting.name)}[/bold]")
        for stage in _stages(setting.config):
            _adopt(setting, stage)
            code = _run(setting.config, stage, pipeline, setting.overrides)
            if code == 130:
                return code
            if code:
                failed[setting.name] = stage
                break
    rows = collect(chosen)
    replace(_folder(base) / "sweep.json", json.dumps({"settings": rows, "failed": failed}, indent=2).encode())
    show(rows, console)
    for name, stage in failed.items():
        console.print(f"[red]failed:[/red] {escape(name)}, in {stage}; the same command tries again")
    return 1 if failed else 0


def settings(base: PipelineConfig, pipeline: str, overrides: list[str], axes: Axes) -> Iterator[Setting]:
    """Every combination of the axes' values, each with `base`'s corpora, targets and benchmark.

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
    pinned = []
    for name, data in base.data.items():
        pinned += [f"data.{name}.source=null", f"data.{name}.corpus={data.corpus}"]
        pinned += [f"data.{name}.targets={data.targets}"] if data.targets else []
    if base.eval:
        pinned += [f"eval.{key}={folder}" for key, folder in base.eval.folders.items()] + ["eval.scenes=null"]
    for combination in itertools.product(*(values for _, values in axes)):
        chosen = dict(zip(keys, combination, strict=True))
        own = [f"{key}={value}" for key, value in chosen.items()]
        wanted = [*overrides, *pinned, *own, f"run_dir={_folder(base) / _name(chosen)}"]
        yield Setting(chosen, load_pipeline(pipeline, wanted), wanted)


def collect(chosen: list[Setting]) -> list[dict[str, Any]]:
    """One row per setting, those of several seeds joined: `values`, `seeds`, `mean` and `stderr` by metric.

    The standard error is that over seeds where there are several, else the benchmark's own where it has one.
    """
    groups: dict[str, list[Setting]] = {}
    for setting in chosen:
        groups.setdefault(_name({k: v for k, v in setting.values.items() if k != "seed"}), []).append(setting)
    rows = []
    for group in groups.values():
        found = [pair for pair in map(_metrics, group) if pair[0]]
        means: Metrics = {}
        errors: Metrics = {}
        for name in dict.fromkeys(name for metrics, _ in found for name in metrics):
            values = [metrics[name] for metrics, _ in found if name in metrics]
            means[name] = fmean(values)
            if len(values) > 1:
                errors[name] = stdev(values) / math.sqrt(len(values))
            elif own := found[0][1].get(name):
                errors[name] = own
        swept = {k: v for k, v in group[0].values.items() if k != "seed"}
        rows.append({"values": swept, "seeds": len(found), "mean": means, "stderr": errors})
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


def _metrics(setting: Setting) -> tuple[Metrics, Metrics]:
    """What a setting's finished stages say, and the standard errors of what has one."""
    config, values, errors = setting.config, Metrics(), Metrics()
    for stage in config.stages:
        final = (runs.finished(runs.stage_dir(config, stage)) or {}).get("final", {})
        values |= {f"{stage} {key}": value for key, value in final.items() if key in ("loss", "text")}
    probed = read_json(runs.stage_dir(config, "probe") / "probe.json").get("students", {})
    if config.probe and (last := probed.get(config.probe.students[-1])):
        values |= {f"probe {task}": fmean(by_layer.values()) for task, by_layer in last.items()}
    for key, benchmark in BENCHMARKS.items():
        scores = read_json(runs.stage_dir(config, "evaluate") / key / "scores.json").get("scores", {})
        for row in benchmark.rows:
            if cell := scores.get(row):
                name = f"{benchmark.title} {row}"
                values[name], errors[name] = cell["accuracy"], cell["stderr"]
    return values, errors


def _stages(config: PipelineConfig) -> list[str]:
    """The stages a setting has of its own."""
    return [stage for stage in runs.stages_of(config) if stage not in ("corpus", "featurize")]


def _run(config: PipelineConfig, stage: str, pipeline: str, overrides: list[str]) -> int:
    """Run a stage unless it has finished; its exit code."""
    if runs.begin(runs.stage_dir(config, stage), runs.depends_on(config, stage)):
        return 0
    return runner.start(stage, pipeline, overrides)


def _adopt(setting: Setting, stage: str) -> None:
    """Link a stage that another setting has finished with the very same configuration."""
    own = runs.stage_dir(setting.config, stage)
    if own.exists():
        return
    wanted = json.loads(json.dumps(runs.depends_on(setting.config, stage)))
    for other in sorted(own.parent.parent.glob(f"*/{stage}")):
        if runs.finished(other) and OmegaConf.to_container(OmegaConf.load(other / "config.yaml")) == wanted:
            own.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(os.path.relpath(other.resolve(), own.parent.resolve()), own)
            return


def _folder(base: PipelineConfig) -> Path:
    return Path(base.run_dir) / "sweep"


def _name(values: dict[str, str]) -> str:
    """``contrastive=0.3,seed=1``; whole keys where their last parts are the same."""
    lasts = [key.rpartition(".")[2] for key in values]
    short = lasts if len(set(lasts)) == len(lasts) else list(values)
    return re.sub(r"[^\w.,=\[\]{}:-]+", "", ",".join(f"{k}={v}" for k, v in zip(short, values.values(), strict=True)))
