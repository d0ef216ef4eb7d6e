"""The evaluate stage: CV-Bench on a trained student, scores beside the benchmark's baselines."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from olavlm import runs
from olavlm.config import PipelineConfig
from olavlm.data.atomic import replace
from olavlm.data.corpus import Corpus
from olavlm.data.targets import TargetStore
from olavlm.errors import OlaError
from olavlm.eval import cv_bench
from olavlm.eval.answers import PARSER_VERSION, parse_choice
from olavlm.eval.cv_bench import Question
from olavlm.eval.features import ImageFeatures
from olavlm.eval.generate import Request, generate_replies
from olavlm.model import OlaVlmForConditionalGeneration, OlaVlmProcessor
from pipelines.results import read_json


def evaluate(config: PipelineConfig) -> None:
    """Ask the student every question and write ``evaluate/replies.jsonl`` and ``evaluate/scores.json``.

    Stopped anywhere and started again, it asks only what is still without a reply. `replies.jsonl` ends up in the
    benchmark's order, each raw reply with what was read from it.

    Raises:
        OlaError: the pipeline has no `eval` section, the student is not trained, the benchmark is not there, or not the
            features of its images that the student is fed.
    """
    if config.eval is None:
        raise OlaError(f"pipeline {config.name}: no `eval` section; expected one with cv_bench: a folder")
    folder = runs.stage_dir(config, "evaluate")
    if runs.begin(folder, runs.depends_on(config, "evaluate")):
        print_scores(json.loads((folder / "scores.json").read_text()))
        return
    questions = cv_bench.load(config.eval.cv_bench, config.eval.limit)
    model, processor = _load_student(config, config.eval.student)
    features = _features(config, model) if model.config.encoders else None
    requests = [Request(q.id, cv_bench.build_prompt(q.prompt), q.image, _facts(q)) for q in questions]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("CV-Bench", total=len(requests))
        lines = generate_replies(
            model,
            processor,
            requests,
            folder / "replies.jsonl",
            batch=config.eval.batch,
            max_new_tokens=config.eval.max_new_tokens,
            features=features,
            progress=lambda replies: bar.advance(task, replies),
        )
    for question, line in zip(questions, lines, strict=True):
        line |= {"parsed": parse_choice(line["reply"], question.choices), "parser_version": PARSER_VERSION}
    replace(folder / "replies.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    scores: dict[str, Any] = {
        "benchmark": "CV-Bench",
        "student": config.eval.student,
        "questions": len(questions),
        "prompt": cv_bench.build_prompt("{prompt}"),
        "parser_version": PARSER_VERSION,
        "max_new_tokens": config.eval.max_new_tokens,
        "scores": cv_bench.score(questions, {line["id"]: line["parsed"] for line in lines}),
        "baselines": _baselines(Path(config.eval.cv_bench), questions),
    }
    replace(folder / "scores.json", json.dumps(scores, indent=2).encode())
    print_scores(scores)
    runs.finish(folder, {"questions": len(questions), "accuracy": scores["scores"]["micro"]["accuracy"]})


def print_scores(scores: dict[str, Any]) -> None:
    """The table of `scores.json`: a student beside what can be had without looking, or without depth."""
    cells = [scores["scores"][name] for name in cv_bench.ROWS]
    table = Table("CV-Bench, %", *cv_bench.ROWS, box=SIMPLE, padding=(0, 1, 0, 0))

    def add(name: str, values: Iterable[float | None]) -> None:
        table.add_row(name, *("–" if value is None else f"{100 * value:.1f}" for value in values))

    add(scores["student"], (cell and cell["accuracy"] for cell in cells))
    add("± s.e.", (cell and cell["stderr"] for cell in cells))
    add("answered", (cell and cell["answered"] for cell in cells))
    table.add_row("n", *(f"{cell['n']:,}" if cell else "0" for cell in cells), end_section=True)
    for name, by_row in scores["baselines"].items():
        add(name, (by_row.get(row) for row in cv_bench.ROWS))
    Console().print(table)


def _facts(question: Question) -> dict[str, Any]:
    """What is kept beside a raw reply, so that it can be read and scored again without the benchmark."""
    return {
        "task": question.task,
        "source": question.source,
        "question": question.question,
        "choices": list(question.choices),
        "answer": question.answer,
    }


def _load_student(config: PipelineConfig, stage: str) -> tuple[OlaVlmForConditionalGeneration, OlaVlmProcessor]:
    """A finished stage's exported model and its processor, on the accelerator if there is one."""
    folder = runs.stage_dir(config, stage) / "model"
    if not (folder / "config.json").is_file():
        raise OlaError(f"eval.student: {stage!r} has no model in {folder}; train it first (make {stage})")
    disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = OlaVlmForConditionalGeneration.from_pretrained(folder, dtype="auto")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.to(device), OlaVlmProcessor.from_pretrained(folder)


def _features(config: PipelineConfig, model: OlaVlmForConditionalGeneration) -> ImageFeatures:
    """The stored features of the benchmark's images, by the very teachers that the student was trained with."""
    assert config.eval is not None
    encoders = [encoder.name for encoder in model.config.encoder_configs]
    if config.eval.data is None or encoders != config.student.encoders:
        raise OlaError(
            f"eval.student: {config.eval.student!r} is fed features ({', '.join(encoders)}); expected the same as "
            "student.encoders, and eval.data with those of the benchmark's images"
        )
    data = config.data[config.eval.data]
    corpus = Corpus.open(data.corpus)
    store = TargetStore.open(str(data.targets), corpus.id)
    sets = {encoder: store.find(encoder, config.teachers[encoder]) for encoder in encoders}
    pinned = read_json(runs.stage_dir(config, config.eval.student) / "snapshot.json")
    for name, trained in pinned.get("data", {}).items():
        for encoder, target in sets.items():
            if trained["targets"][encoder] != target.path.name:
                raise OlaError(
                    f"{target.path}: not the {encoder} teacher that {config.eval.student} was trained with, "
                    f"data.{name}.targets has {trained['targets'][encoder]}"
                )
    return ImageFeatures(corpus, sets)


def _baselines(folder: Path, questions: list[Question]) -> dict[str, dict[str, float]]:
    """What can be had without looking, by name and row: chance, and whatever ``baselines.json`` says per task.

    The file holds ``{name: {task: accuracy}}``; aggregates follow by the benchmark's own rule, taking a task's accuracy
    to be the same in every source.
    """
    baselines = {"chance": cv_bench.expected(questions, {q.id: 1 / len(q.choices) for q in questions})}
    file = folder / "baselines.json"
    if file.is_file():
        for name, by_task in json.loads(file.read_text()).items():
            if missing := {question.task for question in questions} - by_task.keys():
                raise OlaError(f"{file}: {name}: no accuracy for {', '.join(sorted(missing))}")
            baselines[name] = cv_bench.expected(questions, {q.id: by_task[q.task] for q in questions})
    return baselines
