"""What a run's folder tells: every stage's numbers in one place. Stages that are not there are simply absent."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from olavlm import runs
from olavlm.cli import human_bytes
from olavlm.config import PipelineConfig
from olavlm.data.atomic import replace
from olavlm.eval.benchmarks import BENCHMARKS
from olavlm.eval.bootstrap import Estimate
from olavlm.provenance import provenance
from pipelines.intervals import wilson


def read_json(file: Path) -> dict[str, Any]:
    """The content of a stage's file, {} while the stage has not written it."""
    return json.loads(file.read_text()) if file.is_file() else {}


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a ``.jsonl``, without one that a running stage has only half written; [] if there is no file."""
    text = file.read_text() if file.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def read_replies(folder: Path) -> list[dict[str, Any]]:
    """A benchmark's replies, each with what was read from it; [] while the evaluation is still at work."""
    return [line for line in read_lines(folder / "replies.jsonl") if "parsed" in line]


def summary(config: PipelineConfig) -> dict[str, Any]:
    """Everything a person asks of a run, in numbers; written to ``runs/<pipeline>/summary.json``.

    Returns:
        ``stages`` (by stage: what its done.json says, {} for one that has not finished), ``corpora``, ``targets``
        (featurization's summary, and float16_bytes_per_image by task), ``probe`` (by task: floor, and mean cosine over
        the layers by student), ``benchmarks`` (by key: ``scores`` and ``baselines`` by row), ``provenance``. What is
        not known is {}.
    """
    folders = {stage: runs.stage_dir(config, stage) for stage in runs.stages_of(config)}
    stages = {stage: runs.finished(folder) or {} for stage, folder in folders.items()}
    result = {
        "pipeline": config.name,
        "stages": stages,
        "corpora": stages["corpus"].get("corpora", {}),
        "targets": _targets(config),
        "probe": _probe(read_json(runs.stage_dir(config, "probe") / "probe.json")),
        "benchmarks": _benchmarks(config),
        "provenance": provenance(),
    }
    replace(Path(config.run_dir) / "summary.json", json.dumps(result, indent=2).encode())
    return result


def print_summary(result: dict[str, Any]) -> None:
    """The summary as a table on the terminal."""
    table = Table("", "", title=f"{result['pipeline']}: summary", show_header=False)
    if targets := result["targets"]:
        failed = f", {targets['failed']:,} failed" if targets["failed"] else ""
        table.add_row("featurized", f"{targets['images']:,} images{failed}; {targets['images_per_s']:,.1f} images/s")
        for task, size in targets["bytes_per_image"].items():
            full = targets["float16_bytes_per_image"][task]
            table.add_row(f"  {task}", f"{human_bytes(size)} per image, {size / full:.2f} of 16 bit")
        table.add_row("  target stores", human_bytes(targets["bytes"]))
    for stage, done in result["stages"].items():
        table.add_row(
            stage, f"{done['seconds']:,.0f} s, {done['peak_memory_gib']:.1f} GiB" if done else "[dim]not finished[/dim]"
        )
    for task, probe in result["probe"].items():
        cosines = ", ".join(f"{student} {cosine:.3f}" for student, cosine in probe["students"].items())
        table.add_row(f"probe {task}", f"{cosines} (mean target {probe['floor']:.3f})")
    for key, found in result["benchmarks"].items():
        for name, cell in found["scores"].items():
            if cell and name in next(iter(found["baselines"].values()), {}):
                others = ", ".join(f"{b} {rows[name]:.1%}" for b, rows in found["baselines"].items() if name in rows)
                score = f"{spoken(wilson(cell))}, n = {cell['n']:,} ({others})"
                table.add_row(f"{BENCHMARKS[key].title} {name}", score)
    Console().print(table)


def spoken(share: Estimate) -> str:
    """A share with its 95 % interval, for people."""
    return f"{share.value:.1%} ({100 * share.low:.1f} to {share.high:.1%})"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _targets(config: PipelineConfig) -> dict[str, Any]:
    """Featurization's own summary, and what a value in 16 bit would take."""
    found = read_json(runs.stage_dir(config, "featurize") / "summary.json")
    if found:
        found["float16_bytes_per_image"] = {
            task: 2 * teacher.tokens * teacher.width for task, teacher in config.teachers.items()
        }
    return found


def _benchmarks(config: PipelineConfig) -> dict[str, Any]:
    """Scores and baselines of every benchmark that has been scored."""
    folder = runs.stage_dir(config, "evaluate")
    evaluated = {key: read_json(folder / key / "scores.json") for key in BENCHMARKS}
    return {key: {part: found[part] for part in ("scores", "baselines")} for key, found in evaluated.items() if found}


def _probe(probe: dict[str, Any]) -> dict[str, Any]:
    """By task: the floor, and each student's mean cosine over its layers."""
    students = probe.get("students", {})
    return {
        task: {
            "floor": floor["value"],
            "students": {
                name: fmean(cell["value"] for cell in tasks[task].values())
                for name, tasks in students.items()
                if tasks.get(task)
            },
        }
        for task, floor in probe.get("floor", {}).items()
    }
