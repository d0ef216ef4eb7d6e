"""metrics.jsonl after a kill and a resume."""

import json
import re
from pathlib import Path

import pytest

from train.metrics import TIME_KEYS, Metrics, read

VALUES = {"loss": 2.0, "text": 1.5, "depth/18/smooth_l1": 0.25, "lr": 1e-3}


def log(folder: Path, start: int, end: int, counts: dict[str, int] | None = None) -> dict[str, float]:
    folder.mkdir(exist_ok=True)
    metrics = Metrics(folder, "test", start, 10, counts)
    for step in range(start, end):
        metrics.advance({"samples": 8, "samples_cut": step % 2, "answers_cut": step % 2}, waited=0.5 * step)
        metrics.log(step + 1, VALUES | {"loss": 2.0 / (step + 1)})
    return metrics.close()


def timeless(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k not in TIME_KEYS} for line in read(folder)]


def test_a_resumed_file_equals_the_unbroken_one(tmp_path: Path) -> None:
    log(tmp_path / "whole", 0, 6)
    log(tmp_path / "broken", 0, 5)
    with open(tmp_path / "broken" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    counts = {"samples": 24, "samples_cut": 1, "answers_cut": 1}
    log(tmp_path / "broken", 3, 6, counts)  # the newest checkpoint was of step 3
    assert timeless(tmp_path / "broken") == timeless(tmp_path / "whole")


def test_a_line_names_terms_by_task_and_layer_and_times(tmp_path: Path) -> None:
    totals = log(tmp_path, 0, 1)
    (line,) = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"step", *VALUES, "samples", "samples_cut", "answers_cut"} == set(line) - set(TIME_KEYS)
    assert {"samples_per_s", "data_wait", "memory_gib"} <= set(line)
    assert totals["samples_per_s"] > 0
    assert totals["samples"] == 8
    assert list((tmp_path / "tensorboard").iterdir())


def test_whoever_watches_sees_how_far_it_is_and_how_long_it_will_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log(tmp_path, 0, 2)
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(
        r"step 2/10  loss 1\.000 text 1\.500 depth 0\.250 cut 6\.2%  [\d.]+ samples/s  wait \d+%  [\d.]+ GiB.*"
        r"  ETA \d:\d\d:\d\d",
        line,
    )


def test_quiet_ranks_write_nothing(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, "test", 0, 1, quiet=True)
    metrics.advance({"samples": 8}, 0.0)
    metrics.log(1, VALUES)
    metrics.close()
    assert not list(tmp_path.iterdir())
