"""The benchmarks an evaluation can run, by their key under `eval` in a pipeline."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from olavlm.eval import cv_bench, mmstar
from olavlm.eval.cv_bench import Cell, Question


@dataclass(frozen=True)
class Benchmark:
    """Multiple-choice questions about images in a folder, and how they are asked and scored."""

    title: str
    rows: tuple[str, ...]  # names of the scores people quote, aggregates first
    details: tuple[str, ...]  # names of further scores
    tasks: tuple[str, ...]
    aggregation: str  # a sentence on what the aggregates are
    load: Callable[[str | Path, int | None], list[Question]]
    build_prompt: Callable[[str], str]
    score: Callable[[Sequence[Question], Mapping[str, str | None]], dict[str, Cell | None]]
    expected: Callable[[Sequence[Question], Mapping[str, float]], dict[str, float]]


BENCHMARKS = {
    "cv_bench": Benchmark(
        "CV-Bench",
        cv_bench.ROWS,
        cv_bench.SOURCES,
        cv_bench.TASKS,
        "2D = (ADE20K + COCO) / 2, 3D = Omni3D, overall = (2D + 3D) / 2; micro counts every question once.",
        cv_bench.load,
        cv_bench.build_prompt,
        cv_bench.score,
        cv_bench.expected,
    ),
    "mmstar": Benchmark(
        "MMStar",
        mmstar.ROWS,
        (),
        mmstar.TASKS,
        "macro is the mean of the six categories; micro counts every question once.",
        mmstar.load,
        mmstar.build_prompt,
        mmstar.score,
        mmstar.expected,
    ),
}
