"""The recipe, a few steps each: it makes what ships, the same bytes every time, and goes on where it was stopped."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from olavlm.errors import OlaError
from pipelines.demo_world import make_teachers, records
from pipelines.demo_world.card import AIMS, model_card, output_table, probe_table
from pipelines.demo_world.gates import Measured
from pipelines.demo_world.make_teachers import GATES, SHIPPED, render_material, run_job, train_missing
from pipelines.demo_world.recipe import JOBS, QUICK, Sizes
from pipelines.demo_world.records import RECORD, Record, compare, is_current, recipe_hash, sha256
from pipelines.demo_world.samples import batches

WRITTEN = {RECORD, "MODEL_CARD.md", GATES, "teachers.png"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("weights")
    material = render_material(QUICK)
    for name in JOBS:
        run_job(name, recipe_hash(name, QUICK), material, QUICK, out)
    return out


def _files(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and f.name not in WRITTEN}


def test_recipe_makes_what_ships(trained: Path) -> None:
    """Same files, tensors and shapes as the shipped weights; a record in every folder and nothing half-made."""
    assert _files(trained) == _files(SHIPPED)
    for file in sorted(f for f in _files(SHIPPED) if f.endswith(".safetensors")):
        ours, theirs = load_file(trained / file), load_file(SHIPPED / file)
        # Not the first dimension: how many words the language model knows depends on how much was read.
        assert {k: (v.dtype, v.shape[1:]) for k, v in ours.items()} == {
            k: (v.dtype, v.shape[1:]) for k, v in theirs.items()
        }
    for name, job in JOBS.items():
        record = Record.read(trained / job.folder)
        assert record is not None
        assert record.steps == QUICK.steps[name]
        assert record.cpu_seconds > 0
        assert is_current(trained, name, QUICK)


def test_what_is_finished_is_left_alone_and_what_is_damaged_made_anew(
    trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {f: f.stat().st_mtime_ns for f in trained.rglob("*")}
    train_missing(trained, QUICK)
    assert {f: f.stat().st_mtime_ns for f in trained.rglob("*")} == before

    weights = trained / "depth" / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    (trained / ".depth.partial").mkdir()
    (trained / ".depth.partial" / "config.json").write_text("of a run that was killed")
    capfd.readouterr()
    train_missing(trained, QUICK)
    assert weights.read_bytes() == good, "same seed, same bytes"
    assert not list(trained.rglob("*.partial"))
    finished = [line for line in capfd.readouterr().out.splitlines() if "finished, " in line]
    assert [line.partition(":")[0] for line in finished] == ["depth"]


def test_ctrl_c_ends_everything_and_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines", "teachers", "--quick", "--only", "depth", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Processes of xdist ignore it, and pass that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "rendered in" in line:
            os.killpg(process.pid, signal.SIGINT)
            break
    rest, _ = process.communicate(timeout=60)  # returns when the last process that could write has ended
    assert process.returncode == 130, rest
    assert "run the same command again" in rest
    assert "Traceback" not in rest
    assert not (tmp_path / "depth").exists()


def test_a_hash_covers_what_the_result_depends_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Comments and docstrings do not matter; code at any depth, sizes and steps do, of this job only."""
    root = Path(records.ROOT)
    (tmp_path / "pipelines").mkdir()
    world = tmp_path / "pipelines" / "demo_world"
    world.mkdir()
    for file in (root / "pipelines" / "demo_world").glob("*.py"):
        (world / file.name).write_text(file.read_text())
    monkeypatch.setattr(records, "ROOT", tmp_path)

    def changed(file: str, text: str) -> set[str]:
        before = {name: recipe_hash(name, QUICK) for name in JOBS}
        (world / file).write_text((world / file).read_text() + text)
        return {name for name in JOBS if recipe_hash(name, QUICK) != before[name]}

    assert changed("scenes.py", "# a remark\n") == set()
    assert changed("train_depth.py", "X = 1\n") == {"depth"}
    assert changed("solids.py", "X = 1\n") == set(JOBS), "scenes import it"
    assert changed("benchmark.py", "X = 1\n") == set()
    sizes = Sizes(QUICK.train, QUICK.judge, QUICK.read, {**QUICK.steps, "gen": 5})
    assert {name for name in JOBS if recipe_hash(name, sizes) != recipe_hash(name, QUICK)} == {"gen"}


def test_weights_are_compared(trained: Path, tmp_path: Path) -> None:
    assert set(compare(trained, trained).values()) == {"equal byte for byte"}
    assert "missing" in compare(trained, tmp_path)["depth"]
    assert "largest difference" in compare(trained, SHIPPED)["depth"]


def test_what_is_there_is_measured_and_carded(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The card comes from what lies in the folder alone: writing it again gives the same bytes."""
    monkeypatch.setattr(make_teachers, "QUICK", replace(QUICK, judge=48))
    make_teachers.make_teachers(trained, quick=True, train=False)
    card, gates = trained / "MODEL_CARD.md", Measured(**json.loads((trained / GATES).read_text()))
    written = card.read_text()
    assert all(f"`{job.folder}`" in written for job in JOBS.values())
    assert all(name in written for name in [*gates.probes, *gates.outputs, *AIMS])
    assert np.isfinite([v for found in gates.probes.values() for v in found.values()]).all()
    assert written.count(sha256(trained / "depth" / "model.safetensors")) == 1
    with Image.open(trained / "teachers.png") as sheet:
        assert sheet.width > sheet.height
    said = capsys.readouterr().out
    assert probe_table(gates) in said
    assert "depth: largest difference" in said
    found = {name: record for name, job in JOBS.items() if (record := Record.read(trained / job.folder))}
    assert model_card(trained, found, gates, 48) == written


def test_verdicts_are_honest() -> None:
    gates = Measured(
        {
            "clear": {"target": 0.9, "tower": 0.7, "geometry": 0.1},
            "close": {"target": 0.9, "tower": 0.1, "geometry": 0.8},
        },
        {"gen: R@1 of 256": 0.59, "seg: mIoU, teacher": 0.76, "something else": 0.1},
    )
    lines = [*probe_table(gates).splitlines(), *output_table(gates).splitlines()]
    verdicts = {line.split(" | ")[0].strip("| "): line.rstrip(" |").split(" ")[-1] for line in lines}
    assert verdicts["clear"] == "pass"
    assert verdicts["close"] == "**miss**"
    assert verdicts["gen: R@1 of 256"] == "**miss**"
    assert verdicts["seg: mIoU, teacher"] == "pass"
    assert verdicts["something else"] == "0.100"


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(OlaError, match="no training is called deep"):
        train_missing(tmp_path, QUICK, only=["deep"])
    (tmp_path / RECORD).write_text(json.dumps({"recipe": "?"}))
    with pytest.raises(OlaError, match=RECORD):
        Record.read(tmp_path)


def test_batches_are_epochs_in_random_order() -> None:
    rows = list(batches(count=10, batch=5, steps=5, seed=0))
    assert len(rows) == 5
    for first, second in ((0, 1), (2, 3)):
        assert sorted([*rows[first], *rows[second]]) == list(range(10))
