"""The evaluate stage: benchmarks on a trained student, scores beside each benchmark's baselines."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from olavlm import runs
from olavlm.config import EvalConfig, PipelineConfig
from olavlm.data.atomic import replace
from olavlm.data.corpus import Corpus
from olavlm.data.targets import TargetStore
from olavlm.errors import OlaError
from olavlm.eval.answers import PARSER_VERSION, parse_choice
from olavlm.eval.benchmarks import BENCHMARKS, Benchmark
from olavlm.eval.cv_bench import Question
from olavlm.eval.features import ImageFeatures
from olavlm.eval.generate import Request, generate_replies
from olavlm.model import OlaVlmForConditionalGeneration, OlaVlmProcessor
from pipelines.results import read_json
from train.distributed import World

Student = tuple[OlaVlmForConditionalGeneration, OlaVlmProcessor]


def evaluate(config: PipelineConfig) -> None:
    """Ask the student every benchmark; write ``evaluate/<benchmark>/replies.jsonl`` and ``…/scores.json``.

    Stopped anywhere and started again, it asks only what is still without a reply; torchrun's ranks share the
    questions. `replies.jsonl` ends up in the benchmark's order, each raw reply with what was read from it.

    Raises:
        OlaError: the pipeline has no `eval` section, the student is not trained or was with another configuration, a
            benchmark is not there, or not the features of its images that the student is fed; somebody else evaluates.
    """
    if config.eval is None:
        raise OlaError(f"pipeline {config.name}: no `eval` section; expected one with cv_bench or mmstar: a folder")
    folder = runs.stage_dir(config, "evaluate")
    with World.join() as world, world.alone(folder):
        if not runs.begin(folder, runs.depends_on(config, "evaluate")):
            asked = {key: BENCHMARKS[key].load(path, config.eval.limit) for key, path in config.eval.folders.items()}
            student = _load_student(config, config.eval.student)
            features = _features(config, student[0]) if student[0].config.encoders else None
            for key, questions in asked.items():
                _ask(key, questions, config.eval, student, features, folder / key, world)
            if world.rank == 0:
                runs.finish(folder, {"questions": sum(map(len, asked.values()))})
            world.barrier()
        if world.rank == 0:
            for key in config.eval.folders:
                print_scores(BENCHMARKS[key], json.loads((folder / key / "scores.json").read_text()))


def print_scores(benchmark: Benchmark, scores: dict[str, Any]) -> None:
    """The table of a `scores.json`: a student beside what can be had without looking, or without depth."""
    cells = [scores["scores"][name] for name in benchmark.rows]
    table = Table(f"{benchmark.title}, %", *benchmark.rows, box=SIMPLE, padding=(0, 1, 0, 0))

    def add(name: str, values: Iterable[float | None]) -> None:
        table.add_row(name, *("–" if value is None else f"{100 * value:.1f}" for value in values))

    add(scores["student"], (cell and cell["accuracy"] for cell in cells))
    add("± s.e.", (cell and cell["stderr"] for cell in cells))
    add("answered", (cell and cell["answered"] for cell in cells))
    table.add_row("n", *(f"{cell['n']:,}" if cell else "0" for cell in cells), end_section=True)
    for name, by_row in scores["baselines"].items():
        add(name, (by_row.get(row) for row in benchmark.rows))
    Console().print(table)


def _ask(
    key: str,
    questions: Sequence[Question],
    settings: EvalConfig,
    student: Student,
    features: ImageFeatures | None,
    folder: Path,
    world: World,
) -> None:
    """One benchmark's replies and scores."""
    benchmark = BENCHMARKS[key]
    folder.mkdir(exist_ok=True)
    requests = [Request(q.id, benchmark.build_prompt(q.prompt), q.image, _facts(q)) for q in questions]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=world.rank > 0) as bar:
        task = bar.add_task(benchmark.title + (f", 1 of {world.size} shares" if world.size > 1 else ""))
        lines = generate_replies(
            *student,
            requests,
            folder / "replies.jsonl",
            batch=settings.batch,
            max_new_tokens=settings.max_new_tokens,
            features=features,
            ranks=world,
            progress=lambda done, of: bar.update(task, completed=done, total=of),
        )
    if world.rank > 0:
        return
    for question, line in zip(questions, lines, strict=True):
        line |= {"parsed": parse_choice(line["reply"], question.choices), "parser_version": PARSER_VERSION}
    scores: dict[str, Any] = {
        "benchmark": benchmark.title,
        "student": settings.student,
        "questions": len(questions),
        "prompt": benchmark.build_prompt("{prompt}"),
        "parser_version": PARSER_VERSION,
        "max_new_tokens": settings.max_new_tokens,
        "scores": benchmark.score(questions, {line["id"]: line["parsed"] for line in lines}),
        "baselines": _baselines(benchmark, Path(settings.folders[key]), questions),
    }
    replace(folder / "replies.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    replace(folder / "scores.json", json.dumps(scores, indent=2).encode())


def _facts(question: Question) -> dict[str, Any]:
    """What is kept beside a raw reply, so that it can be read and scored again without the benchmark."""
    return {
        "task": question.task,
        "source": question.source,
        "question": question.question,
        "choices": list(question.choices),
        "answer": question.answer,
    }


def _load_student(config: PipelineConfig, stage: str) -> Student:
    """A finished stage's exported model and its processor, on the accelerator if there is one."""
    folder = runs.require(config, stage) / "model"
    if not (folder / "config.json").is_file():
        raise OlaError(f"eval.student: {stage!r} has finished, but there is no model in {folder} any more")
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


def _baselines(benchmark: Benchmark, folder: Path, questions: Sequence[Question]) -> dict[str, dict[str, float]]:
    """What can be had without looking, by name and row: chance, and whatever ``baselines.json`` says per task.

    The file holds ``{name: {task: accuracy}}``; aggregates follow by the benchmark's own rule, taking a task's accuracy
    to be the same in every source.
    """
    known: dict[str, Mapping[str, float]] = {"chance": {q.id: 1 / len(q.choices) for q in questions}}
    file = folder / "baselines.json"
    if file.is_file():
        for name, by_task in json.loads(file.read_text()).items():
            if missing := {question.task for question in questions} - by_task.keys():
                raise OlaError(f"{file}: {name}: no accuracy for {', '.join(sorted(missing))}")
            known[name] = {q.id: by_task[q.task] for q in questions}
    return {name: benchmark.expected(questions, right) for name, right in known.items()}
