"""Per-layer probes on frozen students."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from olavlm import runs
from olavlm.errors import OlaError
from train.probe import probe, split
from train.stage import run


@given(samples=st.integers(2, 2000), held_out=st.floats(0.01, 0.99), seed=st.integers(0, 9))
def test_the_split_is_disjoint_and_complete(samples: int, held_out: float, seed: int) -> None:
    train, held = split(samples, held_out, seed)
    assert sorted(np.concatenate([train, held])) == list(range(samples))
    assert len(train) > 0
    assert len(held) > 0
    assert abs(len(held) - held_out * samples) <= 1


def test_every_student_layer_and_task_is_probed_on_the_same_images(world: Any, tmp_path: Path) -> None:
    config = world.config(f"run_dir={tmp_path}", "stages.pretrain.max_steps=1")
    with pytest.raises(OlaError, match="no model here"):
        probe(config)
    run(config, "pretrain")
    probe(config)
    result = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert list(result["students"]) == ["initial", "pretrain"]
    for cosines in result["students"].values():
        assert {task: list(layers) for task, layers in cosines.items()} == {"depth": ["1", "2"], "gen": ["1", "2"]}
        assert all(-1 <= value <= 1 for layers in cosines.values() for value in layers.values())
    assert result["students"]["initial"] != result["students"]["pretrain"]
    assert set(result["floor"]) == {"depth", "gen"}
    assert result["held_out"] == 5
    done = runs.finished(tmp_path / "probe")
    assert done is not None
    assert done["students"] == result["students"]


def test_a_probe_goes_on_with_the_students_that_are_missing(world: Any, tmp_path: Path) -> None:
    one = world.config(f"run_dir={tmp_path}/a", "probe.students=[initial]")
    probe(one)
    probe(world.config(f"run_dir={tmp_path}/b", "probe.students=[initial]"))
    first, second = (json.loads((tmp_path / name / "probe" / "probe.json").read_text()) for name in "ab")
    assert first == second  # a function of the seed
    (tmp_path / "a" / "probe" / "done.json").unlink()
    marked = first | {"students": {"initial": {"depth": {"1": 0.5}, "gen": {"1": 0.5}}}}
    (tmp_path / "a" / "probe" / "probe.json").write_text(json.dumps(marked))
    probe(one)
    assert json.loads((tmp_path / "a" / "probe" / "probe.json").read_text()) == marked


def test_probes_learn(own_world: Any, tmp_path: Path, commit: Callable[..., Any]) -> None:
    """All images share one target: the mean target is perfect, and a trained probe comes near it."""
    shutil.rmtree(own_world.folder / "targets")
    for task, teacher in own_world.config().teachers.items():
        commit(own_world, task, teacher, constant=True)
    overrides = [f"run_dir={tmp_path}", "probe.students=[initial]", "probe.steps=60", "probe.lr=0.01"]
    probe(own_world.config(*overrides))
    result = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert all(value == pytest.approx(1, abs=1e-3) for value in result["floor"].values())
    assert all(value > 0.7 for layers in result["students"]["initial"].values() for value in layers.values())
