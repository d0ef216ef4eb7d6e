"""A run's folder as the stages leave it, with made-up numbers: a small pipeline, its benchmark, every stage's files."""

import io
import json
import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf
from PIL import Image

from olavlm import runs
from olavlm.config import PipelineConfig, load_pipeline
from olavlm.eval import cv_bench
from olavlm.eval.mmstar import TASKS
from pipelines.runner import Processes

PIPELINE = """
name: small
data:
  pretrain: {{corpus: {0}/corpus, targets: {0}/targets}}
teachers:
  depth: {{teacher: depth_anything, weights: nowhere/depth, input_size: 64, grid: 8, width: 96}}
  gen: {{teacher: unclip, weights: nowhere/gen, input_size: 64, grid: 1, width: 96, codec: fp16}}
student:
  vision_tower: nowhere/vision
  language_model: nowhere/llm
  tasks: [depth, gen]
  layers: {{depth: [2, 3], gen: [4]}}
stages:
  pretrain: {{data: [pretrain], trainable: [projector], losses: {{depth: 1}}, lr: 0.1, global_batch: 4, micro_batch: 4}}
  finetune: {{init: pretrain, data: [pretrain], trainable: [projector], lr: 0.01, global_batch: 4, micro_batch: 4}}
probe: {{data: pretrain, students: [initial, pretrain], tasks: [depth, gen]}}
eval: {{cv_bench: {0}/cv_bench, student: finetune, batch: 4, max_new_tokens: 5}}
run_dir: {0}/run
"""

#: Images with targets of the demo world's teachers, and its student; a test's own YAML completes it.
DEMO_WORLD = """
data: {{train: {{corpus: {0}/corpus, targets: {0}/targets}}}}
teachers:
  depth: {{teacher: depth_anything, weights: {1}/depth, input_size: 64, grid: 8, width: 96}}
  seg: {{teacher: oneformer, weights: {1}/seg, input_size: 64, grid: 8, width: 128}}
  gen: {{teacher: unclip, weights: {1}/gen, input_size: 64, grid: 1, width: 96, codec: fp16}}
featurize: {{executor: inprocess}}
student: {{vision_tower: {1}/student/vision, language_model: {1}/student/llm}}
stages: {{pretrain: {{data: [train], trainable: [projector], lr: 1, global_batch: 1, micro_batch: 1}}}}
run_dir: {0}/run
"""
WEIGHTS = Path(__file__).resolve().parents[2] / "pipelines" / "demo_world" / "weights"

Calls = list[tuple[str, str]]
Codes = dict[tuple[str, str], int]
Leave = Callable[[PipelineConfig, str, Path], dict[str, Any]]

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """A strict reader: every element closed in order, ids unique, references inside the page only."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.labels: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in found:
            self.ids.append(str(found["id"]))
        for name in ("href", "src", "xlink:href", "action", "srcset"):
            if name in found:
                self.links.append(str(found[name]))
        if tag == "img":
            self.images.append(found)
        if tag == "svg":
            self.labels.append(str(found["aria-label"]))
        assert tag not in {"iframe", "object"}
        assert tag != "script" or not found, "a script of the page's own has no attributes"
        assert tag != "link" or found == {"rel": "icon", "href": "data:,"}

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.text += " "

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["script"], ["style"]):
            self.text += data


@pytest.fixture(scope="session")
def read_page() -> type[Page]:
    """Reads a page's HTML, strictly."""
    return Page


@pytest.fixture(scope="session")
def write_pipeline() -> Callable[[Path, str], str]:
    """Writes a pipeline of the demo world's teachers and student, all below one folder, which more YAML completes."""

    def write(folder: Path, rest: str) -> str:
        file = folder / "pipeline.yaml"
        OmegaConf.save(OmegaConf.merge(*map(OmegaConf.create, (DEMO_WORLD.format(folder, WEIGHTS), rest))), file)
        return str(file)

    return write


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    """A pipeline whose folders are all below `tmp_path`; none of them is there."""
    file = tmp_path / "small.yaml"
    file.write_text(PIPELINE.format(tmp_path))
    return load_pipeline(str(file))


@pytest.fixture
def replace_processes(monkeypatch: pytest.MonkeyPatch) -> Callable[[Leave], tuple[Calls, Codes]]:
    """Replaces the stages' processes by a function that leaves a stage's files in its folder and returns its numbers.

    Returns the (stage, setting) that were started, and exit codes by (stage, setting): of what is to fail instead.
    """

    def replace(leave: Leave) -> tuple[Calls, Codes]:
        calls: Calls = []
        codes: Codes = {}

        def run(self: Any, stage: str, pipeline: str, overrides: list[str], log: Any = None, **env: str) -> int:
            config = load_pipeline(pipeline, list(overrides))
            folder = runs.stage_dir(config, stage)
            calls.append((stage, folder.parent.name))
            if code := codes.get((stage, folder.parent.name)):
                return code
            runs.begin(folder, runs.depends_on(config, stage))
            runs.finish(folder, leave(config, stage, folder))
            return 0

        monkeypatch.setattr(Processes, "run", run)
        return calls, codes

    return replace


@pytest.fixture
def benchmark(tmp_path: Path) -> list[dict[str, Any]]:
    """A benchmark of 24 questions in the published layout, with a blind baseline beside it; returns its rows."""
    rows = []
    for i in range(24):
        kind, task = ("2D", ("Count", "Relation")[i % 2]) if i < 12 else ("3D", ("Depth", "Distance")[i % 2])
        buffer = io.BytesIO()
        Image.new("RGB", (40, 30), (i * 10, 90, 200 - i * 5)).save(buffer, "PNG")
        rows.append(
            {
                "idx": i,
                "type": kind,
                "task": task,
                "image": {"bytes": buffer.getvalue(), "path": None},
                "question": "How many <b>chairs</b> & tables?",
                "choices": ["1", "2", "3"][: 2 + i % 2],
                "answer": f"({'AB'[i // 3 % 2]})",
                "prompt": "How many ? (A) 1 (B) 2",
                "filename": "x.png",
                "source": "Omni3D" if kind == "3D" else ("ADE20K", "COCO")[i // 2 % 2],
            }
        )
    folder = tmp_path / "cv_bench"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows[:12]), folder / "test_2d.parquet")
    pq.write_table(pa.Table.from_pylist(rows[12:]), folder / "test_3d.parquet")
    blind = {"Count": 0.4, "Relation": 0.5, "Depth": 0.55, "Distance": 0.5}
    (folder / "baselines.json").write_text(json.dumps({"blind": blind}))
    return rows


@pytest.fixture
def mmstar(tmp_path: Path) -> Path:
    """MMStar's folder in the published layout, two questions of every category."""
    rows = []
    for i in range(12):
        buffer = io.BytesIO()
        Image.new("RGB", (40, 30), (i * 20, 90, 200 - i * 5)).save(buffer, "JPEG")
        rows.append(
            {
                "index": i,
                "question": "How many ?\nOptions: A: 1, B: 2, C: 3, D: 4",
                "image": buffer.getvalue(),
                "answer": "ABCD"[i % 4],
                "category": TASKS[i // 2],
                "l2_category": "object counting",
            }
        )
    folder = tmp_path / "mmstar"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "mmstar.parquet")
    return folder


@pytest.fixture
def finish(config: PipelineConfig) -> Callable[..., Path]:
    """Marks a stage as finished, with these numbers, and returns its folder."""

    def finish(stage: str, **numbers: Any) -> Path:
        folder = runs.stage_dir(config, stage)
        runs.begin(folder, runs.depends_on(config, stage))
        runs.finish(folder, numbers)
        return folder

    return finish


@pytest.fixture
def finished_run(config: PipelineConfig, benchmark: list[dict[str, Any]], finish: Callable[..., Path]) -> Path:
    """The folder of a run whose stages have all finished."""
    corpus = {"id": "0123456789abcdef" * 2, "tars": 3, "samples": 1200, "images": 1000, "bytes": 5_300_000}
    finish("corpus", corpora={"pretrain": corpus})
    featurized = {
        "images": 1000,
        "failed": 2,
        "computed_images": 1000,
        "seconds": 8.0,
        "images_per_s": 125.0,
        "teachers_busy": 0.8,
        "bytes": 6_580_000,
        "bytes_per_image": {"depth": 6400.0, "gen": 192.0},
    }
    (finish("featurize") / "summary.json").write_text(json.dumps(featurized))
    rng = np.random.default_rng(0)
    for stage in ("pretrain", "finetune"):
        lines = []
        for step in range(1, 121):
            text = 1 + 3 * math.exp(-step / 30) + 0.1 * rng.normal()
            parts: dict[str, float] = {}
            if stage == "pretrain":
                for key in ("depth/2", "depth/3"):
                    parts[f"{key}/smooth_l1"] = 0.2 + 0.3 * math.exp(-step / 40) + 0.02 * rng.normal()
                    parts[f"{key}/contrastive"] = 3 * math.exp(-step / 50) + 0.1 * rng.normal()
            lines.append({"step": step, "loss": text + sum(parts.values()), "text": text, **parts, "lr": 1e-3})
        folder = finish(stage, steps=120, samples=480, samples_per_s=11.5, data_wait=0.012)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    layers = ("1", "2", "3", "4")
    cosines = {
        name: {task: dict(zip(layers, map(_cell, values), strict=True)) for task, values in by_task.items()}
        for name, by_task in {
            "initial": {"depth": (0.61, 0.61, 0.59, 0.60), "gen": (0.90, 0.90, 0.90, 0.90)},
            "pretrain": {"depth": (0.71, 0.78, 0.77, 0.71), "gen": (0.91, 0.92, 0.95, 0.96)},
        }.items()
    }
    probe = {"students": cosines, "floor": {"depth": _cell(0.5), "gen": _cell(0.88)}, "held_out": 200}
    (finish("probe") / "probe.json").write_text(json.dumps(probe))

    questions = cv_bench.load(str(config.eval.cv_bench if config.eval else ""))
    replies = [("(A)", "A"), ("(B) because <i>", "B"), ("no idea", None)]
    lines = []
    for i, q in enumerate(questions):
        reply, parsed = replies[i // 2 % 3]
        lines.append(
            {"id": q.id, "prompt": q.prompt, "reply": reply, "task": q.task, "source": q.source, "question": q.question,
             "choices": list(q.choices), "answer": q.answer, "parsed": parsed, "parser_version": 1}
        )  # fmt: skip
    scores = {
        "scores": cv_bench.score(questions, {line["id"]: line["parsed"] for line in lines}),
        "baselines": {
            "chance": cv_bench.expected(questions, {q.id: 1 / len(q.choices) for q in questions}),
            "blind": cv_bench.expected(questions, {q.id: 0.5 for q in questions}),
        },
    }
    folder = finish("evaluate") / "cv_bench"
    folder.mkdir()
    (folder / "replies.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "scores.json").write_text(json.dumps(scores))
    return Path(config.run_dir)


def _cell(mean: float) -> dict[str, float]:
    return {"value": mean, "low": mean - 0.01, "high": mean + 0.01}
