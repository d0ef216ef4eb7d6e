"""One self-contained page about a run, from whatever stages are there: ``runs/<pipeline>/report.html``."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console

from featurize.inspect import pictures, read_image
from featurize.stage import open_jobs
from olavlm import runs
from olavlm.cli import human_bytes
from olavlm.config import PipelineConfig, dump
from olavlm.data.atomic import replace
from olavlm.errors import OlaError
from olavlm.eval.benchmarks import BENCHMARKS
from pipelines import figures
from pipelines.intervals import wilson
from pipelines.page import render
from pipelines.replies import SHOWN, Task, anchor, browse
from pipelines.results import duration, print_summary, read_json, read_lines, summary
from pipelines.see import READ, choose, load_student, look, open_sources
from pipelines.verdict import SEE_NOTHING, aggregate, verdict

PICTURES = 6
SEEN = 2  # images shown as the layers see them
TITLES = {"pretrain": "Pretraining", "vpt": "Visual pretraining", "finetune": "Fine-tuning"}


def report(config: PipelineConfig, images: Sequence[str] = ()) -> Path:
    """Write ``summary.json`` and ``report.html`` into the run's folder, print the summary, and return the page's path.

    The page loads nothing: figures are inline SVG, images data URIs. A stage that has not run is said to be missing.

    Args:
        config: the run's pipeline.
        images: keys of the samples whose images are shown as the layers see them; default: `SEEN`, evenly spread.

    Raises:
        OlaError: the run's folder is not there, or no image of such a key.
    """
    folder = Path(config.run_dir)
    if not folder.is_dir():
        raise OlaError(f"run_dir: no folder {folder}; run a stage of pipeline {config.name} first")
    result = summary(config)
    shown, pictures_missing = _pictures(config)
    layers, layers_missing = _layers(config, images)
    tasks = browse(config)
    probe = read_json(runs.stage_dir(config, "probe") / "probe.json")
    probe_tasks = read_json(runs.stage_dir(config, "probe_tasks") / "probe_tasks.json")
    page = render(
        "report.html.j2",
        name=config.name,
        result=result,
        cards=list(_cards(config, result)),
        verdicts=[said for key in result["benchmarks"] if (said := verdict(result, key))],
        pictures=shown,
        pictures_missing=pictures_missing,
        layers=layers,
        layers_missing=layers_missing,
        read=READ,
        curves=list(_curves(config)),
        probe=Markup(figures.probe_curves(probe, config.student.layers)) if probe.get("floor") else None,
        probe_held_out=probe.get("held_out"),
        probe_tasks=Markup(figures.probe_task_curves(probe_tasks)) if probe_tasks.get("measures") else None,
        benchmarks=[_benchmark(key, found, tasks) for key, found in result["benchmarks"].items()],
        tasks=tasks,
        shown=SHOWN,
        anchor=anchor,
        config=dump(config),
    )
    path = folder / "report.html"
    replace(path, page.encode())
    print_summary(result)
    Console().print(f"report: {path}", highlight=False, soft_wrap=True)
    return path


def _cards(config: PipelineConfig, result: dict[str, Any]) -> Iterator[dict[str, str]]:
    """The numbers one looks at first, as far as they are known: value, label, and what to compare it with."""
    if targets := result["targets"]:
        failed = f", {targets['failed']:,} failed" if targets["failed"] else ", none failed"
        yield {"value": f"{targets['images']:,}", "label": "images featurized", "note": f"once{failed}"}
        yield {"value": f"{targets['images_per_s']:,.1f}", "label": "images/s", "note": "all teachers together"}
        size, full = (sum(targets[key].values()) for key in ("bytes_per_image", "float16_bytes_per_image"))
        note = f"{full / size:.1f}× smaller than 16 bit; {human_bytes(targets['bytes'])} in all"
        yield {"value": human_bytes(size), "label": "stored per image", "note": note}
    for task, probe in result["probe"].items():
        (first, before), *rest = probe["students"].items()
        if rest:
            name, after = max(rest, key=lambda student: student[1])
            note = f"held-out cosine over all layers, {first} → {name}; mean target {probe['floor']:.2f}"
            yield {"value": f"{before:.2f} → {after:.2f}", "label": f"{task} probe", "note": note}
    for key, found in result["benchmarks"].items():
        if row := aggregate(key, found):
            cell = found["scores"][row]
            blind = {b: rows[row] for b, rows in found["baselines"].items() if b in SEE_NOTHING and row in rows}
            others = ", ".join(f"{b} {accuracy:.1%}" for b, accuracy in blind.items())
            ends = wilson(cell)
            note = f"95 % interval {100 * ends.low:.1f} to {ends.high:.1%}, n = {cell['n']:,}; {others}"
            yield {"value": f"{cell['accuracy']:.1%}", "label": f"{BENCHMARKS[key].title} {row}", "note": note}
    if done := [stage for stage in result["stages"].values() if stage]:
        peak = max(stage["peak_memory_gib"] for stage in done)
        note = f"{len(done)} of {len(result['stages'])} stages; peak memory {peak:.1f} GiB"
        yield {"value": duration(sum(stage["seconds"] for stage in done)), "label": "computing time", "note": note}


def _benchmark(key: str, found: dict[str, Any], tasks: Sequence[Task]) -> dict[str, Any]:
    """A benchmark's figure and table."""
    benchmark, baselines = BENCHMARKS[key], found["baselines"]
    scores = {row: found["scores"].get(row) for row in (*benchmark.rows, *benchmark.details)}
    intervals = {row: wilson(cell) for row, cell in scores.items() if cell}
    return {
        "title": benchmark.title,
        "figure": Markup(figures.score_dots(benchmark.title, {"student": intervals}, baselines, benchmark.rows)),
        "scores": {row: cell | asdict(intervals[row]) for row, cell in scores.items() if cell},
        "links": {task.name: task.id for task in tasks if task.benchmark == key},
        "gaps": {benchmark.rows[0], "micro", benchmark.tasks[-1]},  # rows with room behind them
        "baselines": baselines,
        "aggregation": benchmark.aggregation,
    }


def _pictures(config: PipelineConfig) -> tuple[list[dict[str, Any]], str]:
    """Images beside what is stored about them, or why there are none."""
    data = next((name for name, entry in config.data.items() if entry.targets), None)
    if data is None:
        return [], "no data of this pipeline has targets"
    try:
        return pictures(config, data, PICTURES), ""
    except OlaError as error:
        return [], str(error)


def _layers(config: PipelineConfig, keys: Sequence[str]) -> tuple[dict[str, Any], str]:
    """A few images as the layers of the first student with embedding losses see them, or why there are none."""
    stage = next((name for name, settings in config.stages.items() if any(settings.losses.values())), None)
    if stage is None:
        return {}, "no stage of this pipeline has embedding losses"
    held_out = config.probe is not None and config.probe.data not in config.stages[stage].data
    try:
        student = load_student(runs.require(config, stage) / "model")
        jobs = {job.name: job for job in open_jobs(config)}
        wanted = config.probe.data if config.probe and held_out else next(iter(jobs))
        job = jobs.get(wanted)
        if job is None:
            return {}, f"data.{wanted} has no targets"
        chosen = choose(job, keys, SEEN)
        images = [read_image(job, stored) for stored in chosen]
        views = look(student, images, open_sources(student[0], config.teachers, config.data))
    except OlaError as error:
        if keys:
            raise
        return {}, str(error)
    shown = [{"key": stored.entry["key"], "views": of} for stored, of in zip(chosen, views, strict=True)]
    return {"student": stage, "data": wanted, "held_out": held_out, "images": shown}, ""


def _curves(config: PipelineConfig) -> Iterator[dict[str, Any]]:
    """The loss figures of every training stage that has logged steps."""
    for stage in config.stages:
        lines = read_lines(runs.stage_dir(config, stage) / "metrics.jsonl")
        if lines:
            parts = figures.embedding_losses(lines, f"{TITLES[stage]}, embedding losses")
            yield {
                "title": TITLES[stage],
                "steps": lines[-1]["step"],
                "text": Markup(figures.text_losses(lines, TITLES[stage])),
                "parts": parts and Markup(parts),
            }
