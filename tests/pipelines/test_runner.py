"""The stage runner: order, skipping, failures; stages themselves are tested where they live."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from olavlm import runs
from olavlm.config import load_pipeline
from olavlm.errors import OlaError
from pipelines import runner


@pytest.fixture
def config(tmp_path):
    return load_pipeline("demo", [f"run_dir={tmp_path}"])


@pytest.fixture
def started(config, monkeypatch, tmp_path):
    """Replaces the stages' processes: each finishes at once, or with the exit code asked for."""
    calls, codes = [], {}

    def run(self, stage, pipeline, overrides):
        calls.append((stage, pipeline, tuple(overrides)))
        if stage == "report":
            (tmp_path / "report.html").touch()
        elif not codes.get(stage):
            runs.begin(runs.stage_dir(config, stage), runs.depends_on(config, stage))
            runs.finish(runs.stage_dir(config, stage), {})
        return codes.get(stage, 0)

    monkeypatch.setattr(runner.Processes, "run", run)
    return calls, codes


STAGES = ["corpus", "featurize", "pretrain", "finetune", "probe", "probe_tasks", "evaluate"]


def test_stages_run_in_order_with_the_overrides_and_then_the_report(config, started):
    calls, _ = started
    assert runner.run(config, "demo", ["seed=1"]) == 0
    assert calls == [(stage, "demo", ("seed=1",)) for stage in [*STAGES, "report"]]


def test_finished_stages_are_skipped(config, started):
    calls, _ = started
    runner.run(config, "demo", [])
    calls.clear()
    assert runner.run(config, "demo", []) == 0
    assert not calls


def test_a_failing_stage_ends_the_run_with_its_code_and_is_tried_again(config, started):
    calls, codes = started
    codes["pretrain"] = 130
    assert runner.run(config, "demo", []) == 130
    assert [stage for stage, *_ in calls] == ["corpus", "featurize", "pretrain"]
    calls.clear()
    codes.clear()
    assert runner.run(config, "demo", []) == 0
    assert [stage for stage, *_ in calls] == [*STAGES[2:], "report"]


def test_a_changed_configuration_is_refused_before_anything_starts_over(config, started):
    calls, _ = started
    runner.run(config, "demo", [])
    calls.clear()
    other = load_pipeline("demo", [f"run_dir={config.run_dir}", "student.layers.depth=[1]"])
    with pytest.raises(OlaError, match=r"student\.layers\.depth: \[2, 3\] there, \[1\] now"):
        runner.run(other, "demo", [])
    assert not calls


def test_a_killed_stage_is_named(config, monkeypatch, tmp_path):
    monkeypatch.setitem(runner.COMMANDS, "corpus", ["tests_no_such_module"])
    monkeypatch.setattr(runner.sys, "executable", str(_script(tmp_path, "kill -9 $$")))
    with pytest.raises(OlaError, match="stage corpus was ended by SIGKILL"):
        runner.run(config, "demo", [])


def test_sigterm_reaches_the_stage_and_ends_the_run_whatever_the_stage_says(config, monkeypatch, tmp_path):
    said = tmp_path / "said"
    waits = f"trap 'kill $!; echo stopped > {said}; exit 1' TERM; tail -f /dev/null & kill -TERM $PPID; wait"
    monkeypatch.setattr(runner.sys, "executable", str(_script(tmp_path, waits)))
    assert runner.run(config, "demo", []) == 130
    assert said.read_text() == "stopped\n"


def test_all_stages_under_way_are_stopped_and_no_more_are_started(monkeypatch, tmp_path):
    waits = "trap 'kill $!; echo stopped; exit 1' TERM; tail -f /dev/null & echo ready > $READY; wait"
    monkeypatch.setattr(runner.sys, "executable", str(_script(tmp_path, waits)))
    logs, ready = ([tmp_path / f"{name}.{kind}" for name in ("one", "two")] for kind in ("log", "ready"))
    with runner.Processes() as processes, ThreadPoolExecutor(2) as pool:
        both = []
        for log, pipe in zip(logs, ready, strict=True):
            os.mkfifo(pipe)
            both.append(pool.submit(processes.run, "corpus", "demo", [], log, READY=str(pipe)))
        assert [pipe.read_text() for pipe in ready] == ["ready\n"] * 2
        processes.stop()
        assert [one.result() for one in both] == [130, 130]
        assert processes.run("corpus", "demo", []) == 130
    assert [log.read_text() for log in logs] == ["stopped\n"] * 2


def test_every_stage_of_every_pipeline_has_a_command():
    for name in ("demo", "photos", "llava558k-llama3-8b"):
        assert set(runs.stages_of(load_pipeline(name))) <= runner.COMMANDS.keys()


def test_summary_of_a_stage_is_plain_json(config, started):
    runner.run(config, "demo", [])
    done = json.loads((runs.stage_dir(config, "corpus") / "done.json").read_text())
    assert set(done) == {"seconds", "peak_memory_gib", "provenance"}


def _script(folder, body):
    file = folder / "python"
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)
    return file
