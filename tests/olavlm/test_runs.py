"""A run's folder: finished stages are recognised, changed configurations refused by name."""

import errno
import fcntl
import os

import pytest

from olavlm import runs
from olavlm.config import load_pipeline
from olavlm.errors import OlaError


def test_finished_only_after_finish(tmp_path):
    folder = tmp_path / "stage"
    assert not runs.begin(folder, {"a": 1})
    assert runs.finished(folder) is None
    assert not runs.begin(folder, {"a": 1}), "an unfinished stage is run again"
    runs.finish(folder, {"images": 3})
    assert runs.begin(folder, {"a": 1})
    assert runs.finished(folder)["images"] == 3


def test_changed_configuration_is_refused_by_name(tmp_path):
    runs.begin(tmp_path, {"stage": {"lr": 0.1, "data": ["x"]}})
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(OlaError, match=r"stage\.lr: 0\.1 there, 0\.2 now"):
        runs.begin(tmp_path, {"stage": {"lr": 0.2, "data": ["x"]}})


def test_a_stage_that_others_start_from_must_be_as_configured(tmp_path):
    where = f"run_dir={tmp_path}"
    config = load_pipeline("demo", [where])
    with pytest.raises(OlaError, match=r"pretrain: pretrain has not finished; run it first \(make pretrain\)"):
        runs.require(config, "pretrain")
    runs.begin(tmp_path / "pretrain", runs.depends_on(config, "pretrain"))
    runs.finish(tmp_path / "pretrain", {})
    assert runs.require(config, "pretrain") == tmp_path / "pretrain"
    runs.require(load_pipeline("demo", [where, "stages.finetune.lr=0.5", "stages.pretrain.keep=9"]), "pretrain")
    changed = load_pipeline("demo", [where, "stages.pretrain.losses={}"])
    with pytest.raises(
        OlaError, match=r"pretrain/config\.yaml was .*\(stages\.pretrain\.losses\.depth: 0\.5 there, None now"
    ):
        runs.require(changed, "pretrain")


def test_a_configuration_that_produced_nothing_is_replaced(tmp_path):
    runs.begin(tmp_path, {"layers": [99]})
    assert not runs.begin(tmp_path, {"layers": [3]})
    assert "99" not in (tmp_path / "config.yaml").read_text()


def test_only_one_is_at_work_in_a_folder(tmp_path):
    folder = tmp_path / "run" / "stage"
    refused = pytest.raises(OlaError, match=f"{folder}: another process is at work")
    with runs.alone(folder), refused, runs.alone(folder):
        pass
    with runs.alone(folder):
        pass


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with runs.alone(tmp_path), runs.alone(tmp_path):
        pass


@pytest.mark.parametrize(
    ("override", "stage", "changes"),
    [
        ("stages.pretrain.lr=0.5", "pretrain", True),
        ("stages.pretrain.lr=0.5", "finetune", True),  # it starts from pretrain's model
        ("stages.finetune.lr=0.5", "pretrain", False),
        ("stages.pretrain.lr=0.5", "featurize", False),
        ("stages.pretrain.loader_threads=7", "pretrain", False),  # speed only
        ("stages.pretrain.micro_batch=8", "pretrain", False),  # resumable on another accumulation (promise 5)
        ("teachers.depth.codec=fp16", "featurize", True),
        ("featurize.workers=3", "featurize", False),
        ("stages.finetune.lr=0.5", "evaluate", True),
        ("eval.batch=3", "evaluate", False),
        ("stages.finetune.lr=0.5", "corpus", False),
        ("data.pretrain.source.scenes=5", "corpus", True),
    ],
)
def test_a_stage_depends_on_exactly_what_changes_its_result(override, stage, changes):
    before = runs.depends_on(load_pipeline("demo"), stage)
    after = runs.depends_on(load_pipeline("demo", [override]), stage)
    assert (before != after) == changes
