"""One self-contained page about a run, from whatever stages are there: ``runs/<pipeline>/report.html``."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console

from featurize.inspect import pictures, read_image, spread, stored_images
from featurize.stage import open_jobs
from olavlm import runs
from olavlm.cli import human_bytes
from olavlm.config import PipelineConfig, dump
from olavlm.data.atomic import replace
from olavlm.data.images import decode_image
from olavlm.errors import OlaError
from olavlm.eval.benchmarks import BENCHMARKS
from pipelines import figures
from pipelines.page import render
from pipelines.results import duration, print_summary, read_json, read_lines, summary
from pipelines.see import READ, load_student, look, open_sources

PICTURES = 6
SEEN = 2  # images shown as the layers see them
SEE_NOTHING = ("chance", "blind")  # baselines; all others know something of the picture, but no depth
TITLES = {"pretrain": "Pretraining", "vpt": "Visual pretraining", "finetune": "Fine-tuning"}


def report(config: PipelineConfig) -> Path:
    """Write ``summary.json`` and ``report.html`` into the run's folder, print the summary, and return the page's path.

    The page loads nothing: figures are inline SVG, images data URIs. A stage that has not run is said to be missing.

    Raises:
        OlaError: the run's folder is not there.
    """
    folder = Path(config.run_dir)
    if not folder.is_dir():
        raise OlaError(f"run_dir: no folder {folder}; run a stage of pipeline {config.name} first")
    result = summary(config)
    shown, pictures_missing = _pictures(config)
    layers, layers_missing = _layers(config)
    replies = [reply for key in BENCHMARKS for reply in _replies(config, key)]
    probe = read_json(runs.stage_dir(config, "probe") / "probe.json")
    page = render(
        "report.html.j2",
        name=config.name,
        result=result,
        cards=list(_cards(config, result)),
        verdicts=[said for key in result["benchmarks"] if (said := _verdict(result, key))],
        pictures=shown,
        pictures_missing=pictures_missing,
        layers=layers,
        layers_missing=layers_missing,
        read=READ,
        curves=list(_curves(config)),
        probe=Markup(figures.probe_curves(probe, config.student.layers)) if probe.get("floor") else None,
        probe_held_out=probe.get("held_out"),
        benchmarks=[_benchmark(key, found) for key, found in result["benchmarks"].items()],
        replies=replies,
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
        if row := _aggregate(key, found):
            cell = found["scores"][row]
            blind = {b: rows[row] for b, rows in found["baselines"].items() if b in SEE_NOTHING and row in rows}
            others = ", ".join(f"{b} {accuracy:.1%}" for b, accuracy in blind.items())
            note = f"± {cell['stderr']:.1%} s.e., n = {cell['n']:,}; {others}"
            yield {"value": f"{cell['accuracy']:.1%}", "label": f"{BENCHMARKS[key].title} {row}", "note": note}
    if done := [stage for stage in result["stages"].values() if stage]:
        peak = max(stage["peak_memory_gib"] for stage in done)
        note = f"{len(done)} of {len(result['stages'])} stages; peak memory {peak:.1f} GiB"
        yield {"value": duration(sum(stage["seconds"] for stage in done)), "label": "computing time", "note": note}


def _benchmark(key: str, found: dict[str, Any]) -> dict[str, Any]:
    """A benchmark's figure and table."""
    benchmark, (scores, baselines) = BENCHMARKS[key], (found["scores"], found["baselines"])
    return {
        "title": benchmark.title,
        "figure": Markup(figures.score_dots(benchmark.title, scores, baselines, benchmark.rows)),
        "scores": {row: scores[row] for row in (*benchmark.rows, *benchmark.details) if scores.get(row)},
        "gaps": {benchmark.rows[0], "micro", benchmark.tasks[-1]},  # rows with room behind them
        "baselines": baselines,
        "aggregation": benchmark.aggregation,
    }


def _aggregate(key: str, found: dict[str, Any]) -> str | None:
    """The aggregate people quote; a benchmark cut short has micro only, one that asked nothing has none."""
    return next((row for row in (BENCHMARKS[key].rows[0], "micro") if found["scores"].get(row)), None)


def _verdict(result: dict[str, Any], key: str) -> str | None:
    """What a benchmark's scores prove about looking at the picture: the student against those who do not look.

    And about seeing depth: against those who know the objects' boxes.
    """
    found, row = result["benchmarks"][key], _aggregate(key, result["benchmarks"][key])
    known = {name: found["baselines"].get(name, {}).get(row) for name in SEE_NOTHING}
    blind = {name: accuracy for name, accuracy in known.items() if accuracy is not None}
    if not row or not blind:
        return None
    cell = found["scores"][row]
    name, best = max(blind.items(), key=lambda baseline: baseline[1])
    said = (
        f"{BENCHMARKS[key].title} {row}: {cell['accuracy']:.1%} ± {cell['stderr']:.1%} (standard error). "
        f"The best baseline that sees no picture, {name}: {best:.1%}."
    )
    if cell["accuracy"] - best < 2 * cell["stderr"] or cell["accuracy"] <= best:
        return said + " This run does not show that the student looks at the picture."
    return f"{said}{_sees_depth(found)} One run of one seed: comparing students takes several."


def _sees_depth(found: dict[str, Any]) -> str:
    """A sentence on 3-D questions, if they were asked and cues that are not depth were scored."""
    cell = found["scores"].get("3D")
    cues = {name: rows["3D"] for name, rows in found["baselines"].items() if name not in SEE_NOTHING and "3D" in rows}
    if not cell or not cues:
        return ""
    name, best = max(cues.items(), key=lambda baseline: baseline[1])
    said = f" 3-D questions: {cell['accuracy']:.1%}; the best of the cues that are not depth, {name}: {best:.1%}."
    return said if cell["accuracy"] - best > 2 * cell["stderr"] else said + " This does not show that it sees depth."


def _pictures(config: PipelineConfig) -> tuple[list[dict[str, Any]], str]:
    """Images beside what is stored about them, or why there are none."""
    data = next((name for name, entry in config.data.items() if entry.targets), None)
    if data is None:
        return [], "no data of this pipeline has targets"
    try:
        return pictures(config, data, PICTURES), ""
    except OlaError as error:
        return [], str(error)


def _layers(config: PipelineConfig) -> tuple[dict[str, Any], str]:
    """A few images as the layers of the first student with embedding losses see them, or why there are none."""
    stage = next((name for name, settings in config.stages.items() if any(settings.losses.values())), None)
    if stage is None:
        return {}, "no stage of this pipeline has embedding losses"
    folder = runs.stage_dir(config, stage) / "model"
    if not folder.is_dir():
        return {}, f"no model in {folder} yet"
    held_out = config.probe is not None and config.probe.data not in config.stages[stage].data
    try:
        student = load_student(folder)
        jobs = {job.name: job for job in open_jobs(config)}
        wanted = config.probe.data if config.probe and held_out else next(iter(jobs))
        job = jobs.get(wanted)
        if job is None:
            return {}, f"data.{wanted} has no targets"
        chosen = spread(stored_images(job), SEEN)
        images = [read_image(job, stored) for stored in chosen]
        views = look(student, images, open_sources(student[0], config.teachers, config.data))
    except OlaError as error:
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


def _replies(config: PipelineConfig, key: str) -> list[dict[str, Any]]:
    """A few of a benchmark's raw replies: of every task the first right, wrong and unreadable one."""
    folder = runs.stage_dir(config, "evaluate") / key
    # an evaluation still at work has not read its replies yet
    lines = [line for line in read_lines(folder / "replies.jsonl") if "parsed" in line]
    chosen: dict[str, dict[str, Any]] = {}
    for line in lines:
        line["right"] = line["parsed"] == line["answer"]
        chosen.setdefault(f"{line['task']} {line['right']}", line)
        if line["parsed"] is None:
            chosen.setdefault("unanswered", line)
    images: dict[str, bytes] = {}
    if chosen and config.eval and key in config.eval.folders:
        try:
            images = {question.id: question.image for question in BENCHMARKS[key].load(config.eval.folders[key], None)}
        except OlaError:
            images = {}  # the benchmark's folder is gone; the replies are not
    unique = {line["id"]: line for line in chosen.values()}
    ordered = sorted(unique.values(), key=lambda line: (BENCHMARKS[key].tasks.index(line["task"]), not line["right"]))
    return [
        line | {"image": figures.picture(decode_image(images[line["id"]])) if line["id"] in images else None}
        for line in ordered
    ]
