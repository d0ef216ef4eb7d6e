"""metrics.jsonl after a kill and a resume."""

import json
from pathlib import Path

from train.metrics import TIME_KEYS, Metrics, read

VALUES = {"loss": 2.0, "text": 1.5, "depth/18/smooth_l1": 0.25, "lr": 1e-3}


def log(folder: Path, start: int, end: int) -> dict[str, float]:
    folder.mkdir(exist_ok=True)
    metrics = Metrics(folder, "test", start, 10)
    for step in range(start, end):
        metrics.advance(samples=8, waited=0.5 * step)
        metrics.log(step + 1, VALUES | {"loss": 2.0 / (step + 1)})
    return metrics.close()


def timeless(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k not in TIME_KEYS} for line in read(folder)]


def test_a_resumed_file_equals_the_unbroken_one(tmp_path: Path) -> None:
    log(tmp_path / "whole", 0, 6)
    log(tmp_path / "broken", 0, 5)
    with open(tmp_path / "broken" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    log(tmp_path / "broken", 3, 6)  # the newest checkpoint was of step 3
    assert timeless(tmp_path / "broken") == timeless(tmp_path / "whole")


def test_a_line_names_terms_by_task_and_layer_and_times(tmp_path: Path) -> None:
    totals = log(tmp_path, 0, 1)
    (line,) = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"step", *VALUES, *TIME_KEYS} == set(line)
    assert totals["samples_per_s"] > 0
    assert list((tmp_path / "tensorboard").iterdir())


def test_quiet_ranks_write_nothing(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, "test", 0, 1, quiet=True)
    metrics.advance(8, 0.0)
    metrics.log(1, VALUES)
    metrics.close()
    assert not list(tmp_path.iterdir())
