"""Replies to browse: of every task the failures first, as many as fit into a page, with their images."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from olavlm import runs
from olavlm.config import PipelineConfig
from olavlm.data.images import decode_image
from olavlm.errors import OlaError
from olavlm.eval.benchmarks import BENCHMARKS
from pipelines.figures import picture
from pipelines.results import read_replies

#: Replies of a task that are shown, by outcome, in this order; evenly spread over the benchmark's.
SHOWN = {"unanswered": 8, "wrong": 16, "right": 6}
_SIDE = 320  # pixels of the larger side of an image
_BUDGET = 2_500_000  # characters of all images together


@dataclass
class Task:
    """A benchmark's task: how its replies came out, and some of them."""

    benchmark: str  # key
    name: str
    counts: dict[str, int]  # by outcome
    replies: list[dict[str, Any]]  # lines of replies.jsonl with `outcome` and `picture`, a data URI or None

    @property
    def id(self) -> str:
        """Its anchor in the page."""
        return anchor("replies", self.benchmark, self.name)


def anchor(*parts: str) -> str:
    """An id that HTML, CSS and links take without escaping."""
    return "-".join(re.sub(r"\W+", "-", part).strip("-").lower() for part in parts)


def outcome(line: dict[str, Any]) -> str:
    """What became of a reply: unanswered if no option could be read from it."""
    if line["parsed"] is None:
        return "unanswered"
    return "right" if line["parsed"] == line["answer"] else "wrong"


def browse(config: PipelineConfig) -> list[Task]:
    """Every task of every benchmark that has been scored, with some of its replies."""
    tasks = []
    for key, benchmark in BENCHMARKS.items():
        lines = read_replies(runs.stage_dir(config, "evaluate") / key)
        found = [_task(key, name, [line for line in lines if line["task"] == name]) for name in benchmark.tasks]
        found = [task for task in found if task.replies]
        _add_pictures(found, _images(config, key) if found else {})
        tasks += found
    return tasks


def _task(key: str, name: str, lines: Sequence[dict[str, Any]]) -> Task:
    by_outcome = {kind: [line for line in lines if outcome(line) == kind] for kind in SHOWN}
    chosen = [
        line | {"outcome": kind, "picture": None} for kind, n in SHOWN.items() for line in _spread(by_outcome[kind], n)
    ]
    return Task(key, name, {kind: len(of) for kind, of in by_outcome.items()}, chosen)


def _spread(lines: Sequence[dict[str, Any]], n: int) -> Iterable[dict[str, Any]]:
    """`n` of them at most, evenly spread."""
    return lines if len(lines) <= n else [lines[i * len(lines) // n] for i in range(n)]


def _images(config: PipelineConfig, key: str) -> dict[str, bytes]:
    """Encoded images by question id; {} where the benchmark's folder is gone, which the replies outlive."""
    if config.eval is None or key not in config.eval.folders:
        return {}
    try:
        return {question.id: question.image for question in BENCHMARKS[key].load(config.eval.folders[key], None)}
    except OlaError:
        return {}


def _add_pictures(tasks: Sequence[Task], images: dict[str, bytes]) -> None:
    """Images while they fit, every task's first replies before any task's last."""
    left = _BUDGET
    for rank in range(sum(SHOWN.values())):
        for task in tasks:
            if rank < len(task.replies) and (encoded := images.get(task.replies[rank]["id"])):
                shown = picture(decode_image(encoded), _SIDE)
                if len(shown) <= left:
                    task.replies[rank]["picture"] = shown
                    left -= len(shown)
